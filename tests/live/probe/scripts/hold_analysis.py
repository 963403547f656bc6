"""Stops K-LoRA's analysis in the middle until a test has seen what the page shows meanwhile.

POST /klora-probe/hold      {"at": N}: an analysis waits once N of its layers are done
POST /klora-probe/release   it goes on, and later ones do not wait
"""

import functools
import sys
import threading

from modules import script_callbacks

PATIENCE = 120
"""Seconds after which it goes on by itself, so that a failed test does not block the server."""
state = {"at": None}
gate = threading.Event()


def held(compute_scores):
    """`compute_scores`, waiting inside the progress that it tells."""

    @functools.wraps(compute_scores)
    def compute(*args, progress=None, **fields):
        def tell(done, total):
            if progress:
                progress(done, total)
            if done == state["at"]:
                gate.wait(PATIENCE)

        return compute_scores(*args, progress=tell, **fields)

    return compute


def on_app_started(_demo, app):
    """The routes."""
    loading = sys.modules.get("lib_klora.loading")
    if loading is not None:  # after Reload UI it is the one that an earlier copy of this has put
        itself = getattr(loading.compute_scores, "__wrapped__", loading.compute_scores)
        loading.compute_scores = held(itself)

    @app.post("/klora-probe/hold")
    def hold(fields: dict):
        gate.clear()
        state["at"] = fields["at"]

    @app.post("/klora-probe/release")
    def release():
        state["at"] = None
        gate.set()


script_callbacks.on_app_started(on_app_started)
