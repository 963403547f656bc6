// The first click into a LoRA's field selects its text, so that typing searches for a LoRA instead
// of adding to “None (use tags)”, which would match none.

onUiLoaded(() => {
    const NONE = 'None (use tags)'; // settings.NO_LORA
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
});
