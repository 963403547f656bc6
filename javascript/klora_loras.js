// The first click into a LoRA's field selects its text, so that typing searches for a LoRA instead
// of adding to “None (use tags)”, which would match none.

onUiLoaded(() => {
    for (const input of gradioApp().querySelectorAll(
        '[id$="_klora_content"] input, [id$="_klora_style"] input')) {
        input.addEventListener('focus', () => {
            input.addEventListener('click', () => input.select(), {once: true});
        });
    }
});
