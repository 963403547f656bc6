// The first click into the field of a LoRA selects what stands there: typing then looks for a LoRA,
// where it would lengthen “None (use tags)”, a name that no LoRA has.

onUiLoaded(() => {
    for (const input of gradioApp().querySelectorAll(
        '[id$="_klora_content"] input, [id$="_klora_style"] input')) {
        input.addEventListener('focus', () => {
            input.addEventListener('click', () => input.select(), {once: true});
        });
    }
});
