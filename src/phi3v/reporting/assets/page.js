"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const root = document.documentElement;

  // Theme: the system's, until the button chooses.
  const themeButton = document.getElementById("theme");
  const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const remember = (value) => { try { localStorage.setItem("phi3v-theme", value); } catch { /* storage is off for this file */ } };
  const remembered = () => { try { return localStorage.getItem("phi3v-theme"); } catch { return null; } };
  if (remembered()) root.dataset.theme = remembered();
  const nameTheme = () => { themeButton.textContent = isDark() ? "Light mode" : "Dark mode"; };
  themeButton.hidden = false;
  nameTheme();
  themeButton.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
    nameTheme();
    redraw();
  });
  systemDark.addEventListener("change", () => { nameTheme(); redraw(); });

  // Plots: colours are names of CSS variables.
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const coloured = (value) => {
    if (typeof value === "string" && value.startsWith("--")) return colour(value);
    if (Array.isArray(value)) return value.map(coloured);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v)]));
    return value;
  };
  const drawn = new Set();
  const escapeHtml = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  const safeTraces = (traces) => traces.map((trace) => ({ ...trace, name: escapeHtml(trace.name) }));
  // Row ids that are broken in two need more.
  const heightOf = (layout, narrow) => (layout.height || 300) * (narrow && layout.yaxis && layout.yaxis.type === "category" ? 1.25 : 1);
  function draw(canvas, width) {
    const plot = data.plots[canvas.dataset.plot];
    const narrow = (width || canvas.clientWidth) < 560;
    const axis = { gridcolor: colour("--grid"), linecolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true };
    const layout = structuredClone(plot.layout);
    for (const key of Object.keys(layout)) if (/^[xy]axis/.test(key)) layout[key] = { ...axis, ...layout[key] };
    for (const key of ["xaxis", "yaxis"]) layout[key] = { ...axis, ...layout[key] };
    if (narrow && layout.yaxis.type === "category") {
      // Row ids would take half of a phone's width: they are broken in two.
      const names = layout.yaxis.categoryarray;
      const broken = (name) => {
        const cuts = [...name.matchAll(/-/g)].map((match) => match.index + 1);
        const cut = cuts.sort((a, b) => Math.abs(a - name.length / 2) - Math.abs(b - name.length / 2))[0] || name.length;
        return escapeHtml(name.slice(0, cut)) + "<br>" + escapeHtml(name.slice(cut));
      };
      layout.yaxis = { ...layout.yaxis, tickmode: "array", tickvals: names, ticktext: names.map(broken), tickfont: { size: 10 } };
    }
    Object.assign(layout, {
      height: heightOf(plot.layout, narrow), paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 12, r: 16, t: 12, b: 44, pad: 4 },
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--text") },
      hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--text") }, namelength: -1 },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, ...(layout.legend || {}) },
      dragmode: narrow ? false : "zoom",
    });
    if (width) layout.width = width;
    Plotly.react(canvas, coloured(safeTraces(plot.traces)), coloured(layout), { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false });
    drawn.add(canvas);
  }
  function redraw() { for (const canvas of drawn) if (canvas.isConnected && canvas.clientWidth) draw(canvas); }
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && entry.target.clientWidth) { watcher.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "400px" });
  for (const canvas of document.querySelectorAll("[data-plot]")) {
    // Its room is taken before it is drawn: a link to what stands below lands there.
    canvas.style.minHeight = heightOf(data.plots[canvas.dataset.plot].layout, canvas.clientWidth && canvas.clientWidth < 560) + "px";
    watcher.observe(canvas);
  }
  // Paper is white: plots are drawn in light colours, all of them, and put back afterwards.
  let screenTheme;
  window.addEventListener("beforeprint", () => {
    screenTheme = root.dataset.theme;
    root.dataset.theme = "light";
    for (const canvas of document.querySelectorAll("[data-plot]")) if (canvas.clientWidth) draw(canvas, canvas.closest(".plots") ? 620 : 900);
  });
  window.addEventListener("afterprint", () => {
    if (screenTheme) root.dataset.theme = screenTheme; else delete root.dataset.theme;
    redraw();
  });

  // The table behind a plot is made when it is opened.
  for (const details of document.querySelectorAll("[data-table]")) {
    details.addEventListener("toggle", () => {
      const place = details.querySelector(".scroll");
      if (!details.open || place.firstChild) return;
      const plot = data.plots[details.dataset.table];
      const table = document.createElement("table");
      table.className = "data small";
      table.createCaption().textContent = plot.title;
      table.caption.className = "hidden";
      const head = table.createTHead().insertRow();
      for (const name of plot.columns) { const cell = document.createElement("th"); cell.scope = "col"; cell.textContent = name.replaceAll("_", " "); head.append(cell); }
      const body = table.createTBody();
      for (const values of plot.rows) {
        const row = body.insertRow();
        for (const value of values) {
          const cell = row.insertCell();
          const number = typeof value === "number";
          cell.textContent = value === null ? "–" : number && !Number.isInteger(value) ? String(+value.toPrecision(4)) : value;
          if (number) cell.className = "num";
        }
      }
      place.append(table);
    });
  }

  // Thumbnails: each is in the page once, and shown where it is wanted when its row opens.
  function showPictures(details) {
    for (const image of details.querySelectorAll("img[data-picture]")) {
      if (!image.src) image.src = data.pictures[image.dataset.picture];
    }
  }
  for (const details of document.querySelectorAll("details.row")) {
    details.addEventListener("toggle", () => { if (details.open) showPictures(details); });
  }
  function openTarget() {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.matches("details.row")) { for (let part = target; part; part = part.parentElement.closest("details")) part.open = true; showPictures(target); target.scrollIntoView(); target.querySelector("summary").focus({ preventScroll: true }); }
  }
  window.addEventListener("hashchange", openTarget);
  openTarget();

  // Sorting: a row and the notes below it move together.
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    let order = 0;
    for (const row of body.rows) { if (!row.matches(".note-row")) order += 1; row.dataset.order = order; }
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const descending = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const title = head.textContent;
        const label = (cell) => cell.dataset.label === title || [...cell.parentElement.cells].indexOf(cell) === column;
        const key = (row) => { const cell = [...row.cells].find((c) => c.dataset.label && (c.dataset.label === title)) || [...row.cells].find(label); return cell ? cell.dataset.sort ?? cell.textContent.trim() : ""; };
        const rows = [...body.rows].filter((row) => !row.matches(".note-row"));
        const missing = (text) => text === "" || text === "None";
        rows.sort((a, b) => {
          const x = key(a), y = key(b);
          if (missing(x) || missing(y)) return missing(x) - missing(y) || a.dataset.order - b.dataset.order;
          const [p, q] = [Number(x), Number(y)];
          const compared = Number.isFinite(p) && Number.isFinite(q) ? p - q : x.localeCompare(y);
          return (descending ? -compared : compared) || a.dataset.order - b.dataset.order;
        });
        for (const row of rows) {
          const notes = [...body.querySelectorAll(".note-row")].filter((note) => note.dataset.order === row.dataset.order);
          body.append(row, ...notes);
        }
      });
    });
  }

  // Filters of the accuracy rows.
  const form = document.querySelector(".filters");
  const field = (name) => document.getElementById(`filter-${name}`);
  function filter() {
    const words = field("text").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0, all = 0;
    for (const group of document.querySelectorAll("[data-group]")) {
      let visible = 0;
      for (const row of group.querySelectorAll("tr[data-row]")) {
        const text = row.textContent.toLowerCase();
        const fits = words.every((word) => text.includes(word)) && ["dataset", "method", "status"].every((name) => !field(name).value || row.dataset[name] === field(name).value);
        row.hidden = !fits;
        for (const note of group.querySelectorAll(".note-row")) if (note.dataset.noteOf === row.dataset.row) note.hidden = !fits;
        const detail = document.getElementById(`row-${row.dataset.row}`);
        if (detail) detail.hidden = !fits;
        visible += fits;
        all += 1;
      }
      group.hidden = !visible;
      shown += visible;
    }
    field("count").textContent = `${shown} of ${all} rows`;
  }
  if (form && document.querySelector("tr[data-row]")) {
    form.hidden = false;
    for (const change of ["input", "change"]) form.addEventListener(change, filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    filter();
  }
})();
