// K-LoRA's tags in the prompt: the buttons “C” and “S” on every LoRA card, and Ctrl+Up/Down in a
// <klora:…> tag. The grammar is that of lib_klora/tag.py.

(function() {
    const ROLES = {content: 'content', c: 'content', style: 'style', s: 'style'};
    const OTHER = {content: 'style', style: 'content'};
    const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

    // ---- reading and writing tags -----------------------------------------------------------------

    // All tags of a text: {start, end, name, items, role}, the role as the tag says it.
    function tagsOf(text) {
        return [...text.matchAll(/<klora:([^>:]+)((?::[^>:]*)*)>/g)].map((match) => {
            const items = match[2] ? match[2].slice(1).split(':') : [];
            const words = items.map((item) => item.trim().toLowerCase().replace(/^role\s*=\s*/, ''));
            const role = ROLES[words.find((word) => word in ROLES)];
            return {start: match.index, end: match.index + match[0].length, name: match[1], items, role};
        });
    }

    // Without roles the first is the content, the second the style.
    function withRoles(tags) {
        const given = tags.map((tag) => tag.role);
        return tags.map((tag, i) => {
            if (tag.role) return tag;
            const other = tags.length === 2 ? given[1 - i] : undefined;
            return {...tag, role: other ? OTHER[other] : (i === 0 ? 'content' : 'style')};
        });
    }

    function written(tag, role) {
        const kept = tag.items.filter(
            (item) => !(item.trim().toLowerCase().replace(/^role\s*=\s*/, '') in ROLES));
        return `<klora:${[tag.name, ...kept, role].join(':')}>`;
    }

    function replaced(text, tag, word) {
        let {start, end} = tag;
        if (word === '' && text[start - 1] === ' ') start--;
        return text.slice(0, start) + word + text.slice(end);
    }

    // The prompt after a click on the button `role` of the card `name`: puts the tag in, takes it
    // out, or swaps the two roles if the LoRA has the other one. Every tag then says its role,
    // because without one its place would, and places change here.
    function clicked(text, name, role, weight) {
        const tags = withRoles(tagsOf(text));
        const mine = tags.find((tag) => tag.name === name);
        const fresh = written({name, items: [String(weight)]}, role);
        let placed = Boolean(mine);
        const words = tags.map((tag) => {
            if (mine && mine.role === role) return tag === mine ? '' : written(tag, tag.role);
            if (mine) return written(tag, OTHER[tag.role]);
            if (placed || tag.role !== role) return written(tag, tag.role);
            placed = true;
            return fresh;
        });
        for (let i = tags.length - 1; i >= 0; i--) text = replaced(text, tags[i], words[i]);
        return placed ? text : (text && !/\s$/.test(text) ? `${text} ` : text) + fresh;
    }

    // ---- the buttons on the cards -----------------------------------------------------------------

    // The weight that the card's own click would give: the person's preferred one for this file, which
    // the host writes into the click's code, or the one of the Settings page.
    function weightOf(card) {
        const own = /<lora:[^"]*:"\s*\+\s*([-+.\d]+)\s*\+/.exec(card.getAttribute('onclick') ?? '');
        return own ? own[1] : opts.extra_networks_default_multiplier ?? 1;
    }

    const translated = (text) => (window.localization || {})[text] || text;
    const prompt = (tab) => gradioApp().querySelector(`#${tab}_prompt textarea`);

    function showState(tab) {
        const area = prompt(tab);
        if (!area) return;
        const roles = new Map(withRoles(tagsOf(area.value)).map((tag) => [tag.name, tag.role]));
        for (const button of gradioApp().querySelectorAll(`#${tab}_lora_cards .klora-role`)) {
            const card = button.closest('.card');
            const pressed = roles.get(card.dataset.name) === button.dataset.role;
            if ((button.getAttribute('aria-pressed') === 'true') !== pressed) {
                button.setAttribute('aria-pressed', String(pressed));
            }
        }
    }

    function roleButton(tab, card, role) {
        const button = document.createElement('button');
        button.type = 'button';
        button.className = 'klora-role';
        button.dataset.role = role;
        button.textContent = role[0].toUpperCase();
        button.title = translated(
            `K-LoRA: use as ${role}. Again to remove; the other letter swaps the roles.`);
        button.setAttribute('aria-label', `K-LoRA ${role}: ${card.dataset.name}`);
        button.setAttribute('aria-pressed', 'false');
        button.addEventListener('click', (event) => {
            event.stopPropagation(); // the card would add its <lora:…>
            event.preventDefault();
            const area = prompt(tab);
            area.value = clicked(area.value, card.dataset.name, role, weightOf(card));
            updateInput(area);
            showState(tab);
        });
        button.addEventListener('keydown', (event) => event.stopPropagation());
        return button;
    }

    function addButtons() {
        for (const tab of ['txt2img', 'img2img']) {
            const cards = gradioApp().querySelectorAll(
                `#${tab}_lora_cards .card[data-name]:not(.klora-card)`);
            for (const card of cards) {
                card.classList.add('klora-card');
                const place = document.createElement('div');
                place.className = 'klora-roles';
                place.append(roleButton(tab, card, 'content'), roleButton(tab, card, 'style'));
                card.append(place);
            }
            if (cards.length) showState(tab);
        }
    }

    // ---- Ctrl+Up/Down -----------------------------------------------------------------------------

    // The text with the weight of a tag changed by `delta`, and where the tag then ends.
    function reweighted(text, tag, delta) {
        const change = (item) => {
            const value = parseFloat((parseFloat(item) + delta).toPrecision(12));
            return Number.isInteger(value) ? `${value}.0` : String(value);
        };
        const items = [...tag.items];
        const plain = items.findIndex((item) => NUMBER.test(item.trim()));
        const named = items.map((item) => item.split('=')).map(
            ([key, value]) => value !== undefined && /^(te|unet)$/i.test(key.trim()) &&
                NUMBER.test(value.trim()));
        if (plain >= 0) items[plain] = change(items[plain]);
        else if (named.includes(true)) {
            named.forEach((is, i) => {
                if (is) items[i] = `${items[i].split('=')[0]}=${change(items[i].split('=')[1])}`;
            });
        } else items.unshift(change('1'));
        return replaced(text, tag, `<klora:${[tag.name, ...items].join(':')}>`);
    }

    function editWeight(event) {
        if (!(event.ctrlKey || event.metaKey) || event.altKey || event.shiftKey) return;
        if (event.key !== 'ArrowUp' && event.key !== 'ArrowDown') return;
        const area = event.composedPath()[0];
        if (!area.matches || !area.matches("*:is([id*='_toprow'] [id*='_prompt'], .prompt) textarea")) return;
        const at = area.selectionStart;
        const tag = tagsOf(area.value).find(({start, end}) => start < at && at < end);
        if (!tag) return;
        event.preventDefault();
        event.stopPropagation(); // the host would change what stands after the last colon
        const step = Number(opts.keyedit_precision_extra) || 0.05;
        area.value = reweighted(area.value, tag, event.key === 'ArrowUp' ? step : -step);
        area.selectionStart = area.selectionEnd = at;
        updateInput(area);
    }

    document.addEventListener('keydown', editWeight, true);
    document.addEventListener('input', (event) => {
        const place = event.target.closest && event.target.closest('#txt2img_prompt, #img2img_prompt');
        if (place) showState(place.id.split('_')[0]);
    });
    onAfterUiUpdate(addButtons);
})();
