"""Where the WebUI's own Lora extension is switched off, K-LoRA says so and does no harm."""

from kloras import PAIR, script, tags


def test_it_says_what_is_missing(webui, host):
    base = webui.txt2img()
    webui.settings["disabled_extensions"] = [host.lora_extension]
    try:
        webui.restart()
        result = webui.txt2img(prompt=tags(*PAIR))
        assert result.sha == base.sha
        assert "K-LoRA error: " in result.infotexts[0]
        assert "Lora extension" in result.infotexts[0]
        for fields in (dict(zip(("content", "style"), PAIR, strict=True)), {"alpha": "x"}):
            result = webui.txt2img(alwayson_scripts=script(**fields))
            assert result.sha == base.sha
            assert "K-LoRA error: " in result.infotexts[0]
        assert "K-LoRA" not in webui.txt2img(alwayson_scripts=script(enabled=False)).infotexts[0]
        assert "[K-LoRA] K-LoRA is not available: " in webui.log_since()
    finally:
        del webui.settings["disabled_extensions"]
        webui.restart()
    assert "K-LoRA: " in webui.txt2img(prompt=tags(*PAIR)).infotexts[0]
