"""``mmmoe doctor``: checks the hosts of a job before it trains. ``run.py`` has the table of checks."""
