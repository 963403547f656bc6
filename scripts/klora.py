"""Entry point: the WebUI runs this file and finds the script classes in it."""

from lib_klora.webui import register

if register():
    from lib_klora.webui.compare import CompareScript  # noqa: F401 - found by the WebUI
    from lib_klora.webui.script import KLoraScript  # noqa: F401
