// The accordion opens with the person's defaults, those of Settings → K-LoRA. The page is built with
// the paper's. While the accordion is closed it is filled with the person's wherever these are others
// than what it was filled with before: when the page is loaded, and when settings are applied. An open
// one is left as it is, but for one that the page is loaded with (Settings → Defaults).

(function() {
    if (window.kloraDefaults) return; // a second copy of the extension
    window.kloraDefaults = true;

    const filled = {}; // tab → the defaults that its accordion has, as text

    function isOpen(tab) {
        const id = `#script_${tab}_klora_enabled`; // Gradio 3 and 4 differ in the end of it
        const box = gradioApp().querySelector(`${id}-checkbox input, ${id}-visible-checkbox`);
        return Boolean(box && box.checked);
    }

    function fill() {
        for (const tab of ['txt2img', 'img2img']) {
            const button = gradioApp().querySelector(`#script_${tab}_klora_own_defaults`);
            const place = gradioApp().querySelector(`#script_${tab}_klora_schedule [data-defaults]`);
            if (!button || !place || !Object.keys(opts).length) continue;
            const papers = JSON.parse(place.dataset.defaults), own = {};
            for (const name of Object.keys(papers)) own[name] = opts[name] ?? papers[name];
            const text = JSON.stringify(own);
            const before = filled[tab] ?? JSON.stringify(papers), isNew = !(tab in filled);
            if (text !== before && isOpen(tab) && !isNew) continue;
            filled[tab] = text;
            if (text !== before) button.click();
        }
    }

    onUiLoaded(fill);
    onOptionsChanged(fill);
})();
