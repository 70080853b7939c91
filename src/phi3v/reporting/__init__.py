"""Result files of a run, joined into tables, figures and one page."""
