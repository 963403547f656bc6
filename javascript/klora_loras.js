// The pickers of the two LoRAs. The first click into a field selects its text, so that typing searches
// for a LoRA instead of adding to “None (use tags)”, which would match none. Whoever comes to them,
// by pointer or key, gets the files that are new since the page was loaded. And the button beside
// them, which shows nothing but a sign, has a name.

(function() {
    if (window.kloraLoras) return; // a second copy of the extension
    window.kloraLoras = true;

    onUiLoaded(() => {
        const NONE = 'None (use tags)'; // settings.NO_LORA
        const name = 'Refresh the LoRA lists';
        const RARELY = 2000; // milliseconds between two looks
        for (const input of gradioApp().querySelectorAll(
            '[id$="_klora_content"] input, [id$="_klora_style"] input')) {
            input.addEventListener('focus', () => {
                input.addEventListener('click', () => input.select(), {once: true});
            });
            // However one came into the field: “None (use tags)” is nothing that one adds to.
            input.addEventListener('keydown', (event) => {
                const types = event.key.length === 1 && !event.ctrlKey && !event.metaKey && !event.altKey;
                if (types && input.value === NONE) input.select();
            });
        }
        for (const tab of ['txt2img', 'img2img']) {
            const button = gradioApp().querySelector(`#script_${tab}_klora_look`);
            const picker = gradioApp().querySelector(`#script_${tab}_klora_content`);
            if (!button || !picker) continue;
            let last = -RARELY;
            const look = () => {
                if (performance.now() - last < RARELY) return;
                last = performance.now();
                button.click();
            };
            // Before the click, so that the list is there when it opens.
            picker.closest('.klora-pair').addEventListener('pointerenter', look);
            picker.closest('.klora-pair').addEventListener('focusin', look);
        }
        for (const button of gradioApp().querySelectorAll('button[id$="_klora_refresh"]')) {
            button.title = (window.localization || {})[name] || name; // the host's is of the first picker
            button.setAttribute('aria-label', button.title);
        }
    });
})();
