"""Parts of ``benchmarks/control_plane.py``: ranks that are threads, and the state that they hold."""
