"""Lets Triton's interpreter run loops whose bounds a kernel computes.

It turns such a bound into a Python integer by `int(array)`, which NumPy refuses from version 2.4 on
for an array with one element and a dimension.
"""

from __future__ import annotations

import os
from typing import Any


def mend() -> None:
    """To be called before the first kernel runs; changes nothing on a GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
