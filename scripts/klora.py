"""Entry point: the WebUI runs this file and finds the script class in it."""

from lib_klora.webui import register
from lib_klora.webui.script import KLoraScript  # noqa: F401 - found by the WebUI

register()
