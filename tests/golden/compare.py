"""Compare any implementation with a stored model case (own code; numpy only).

result = dict(logits=[B,L,V] float array, loss=float, hidden_states=[layers+1][B,L,H] or None,
              features=[n_image_features,H] or None, grad_norms={official name: float} or None)
check_model_case(folder, key, result) -> dict of error measures (raises nothing; thresholds are the test's).
"""

import json
import os

import numpy as np


def load_models(folder):
    with open(os.path.join(folder, "models.json")) as file:
        j = json.load(file)
    return j["variants"], {c["key"]: c for c in j["cases"]}, np.load(os.path.join(folder, "models.npz"))


def check_model_case(folder, key, result):
    _, cases, z = load_models(folder)
    c, out = cases[key], {}
    lg, pos = result["logits"], z[key + "/positions"]
    sel = np.stack([lg[i][list(pos[i])] for i in range(len(pos))]).astype(np.float32)
    out["logits"] = float(np.abs(sel[..., z["logit_columns"]] - z[key + "/logits_cols"]).max())
    out["top_vals"] = float(
        np.abs(np.take_along_axis(sel, z[key + "/top_ids"].astype(np.int64), -1) - z[key + "/top_vals"]).max()
    )
    m = sel.max(-1)
    out["logsumexp"] = float(
        np.abs(m + np.log(np.exp((sel - m[..., None]).astype(np.float64)).sum(-1)) - z[key + "/logsumexp"]).max()
    )
    out["loss"] = abs(float(result["loss"]) - c["loss"])
    if result.get("hidden_states") is not None:
        hp, g = z[key + "/hidden_positions"], z[key + "/hidden_states"]
        h = np.stack([np.stack([x[i][list(hp[i])] for i in range(len(hp))]) for x in result["hidden_states"]])
        out["hidden_rel"] = float((np.abs(h - g).max((1, 2, 3)) / np.abs(g).max((1, 2, 3))).max())
    if result.get("features") is not None:
        g = z[key + "/features"]
        out["features_rel"] = float(
            np.abs(result["features"][list(z[key + "/feature_positions"])] - g).max() / np.abs(g).max()
        )
    if result.get("grad_norms") is not None:
        worst = (0.0, "")
        for n, v in c["grad_norms"].items():
            if n.endswith("self_attn.k_proj.bias") or n not in result["grad_norms"]:
                continue
            w = result["grad_norms"][n] or 0.0
            worst = max(worst, (abs(w - (v or 0.0)) / max(v or 0.0, 1e-12) if v else float(w > 1e-12), n))
        out["grad_norm_rel"], out["grad_norm_worst"] = worst
    return out
