"""``report.html``: a conversion to look at, made from ``report.json`` and what lies beside it."""
