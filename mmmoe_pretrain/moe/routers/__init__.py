"""The routers, one per file: functions from ``routing.RouterInputs`` (logits) to ``routing.Choice``. The table is
``kinds.ROUTERS``."""
