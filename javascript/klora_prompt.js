// K-LoRA's tags in the prompt: the buttons “C” and “S” on every LoRA card, and Ctrl+Up/Down in a
// <klora:…> tag. The grammar is that of lib_klora/tag.py.

(function() {
    if (window.kloraPrompt) return; // a second copy of the extension
    window.kloraPrompt = true;

    const ROLES = {content: 'content', c: 'content', subject: 'content', style: 'style', s: 'style'};
    const OTHER = {content: 'style', style: 'content'};
    const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

    // ---- reading and writing tags -----------------------------------------------------------------

    // All tags of a text: {start, end, name, items, role}, the role as the tag says it.
    function tagsOf(text) {
        return [...text.matchAll(/<klora:([^>:]+)((?::[^>:]*)*)>/g)].map((match) => {
            const items = match[2] ? match[2].slice(1).split(':') : [];
            const words = items.map((item) => item.trim().toLowerCase().replace(/^role\s*=\s*/, ''));
            const role = ROLES[words.find((word) => word in ROLES)];
            const name = match[1].trim();
            return {start: match.index, end: match.index + match[0].length, name, items, role};
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
    // because without one its place would, and places change here. A LoRA's own words stand after
    // its tag, and go with it; `wordsOf` gives them by name.
    function clicked(text, name, role, weight, wordsOf) {
        const tags = withRoles(tagsOf(text));
        const mine = tags.find((tag) => tag.name === name);
        const after = (words) => words ? ` ${words}` : '';
        const fresh = written({name, items: [String(weight)]}, role) + after(wordsOf(name));
        let placed = Boolean(mine);
        const words = tags.map((tag) => {
            if (mine && mine.role === role) return tag === mine ? '' : written(tag, tag.role);
            if (mine) return written(tag, OTHER[tag.role]);
            if (placed || tag.role !== role) return written(tag, tag.role);
            placed = true;
            return fresh;
        });
        for (let i = tags.length - 1; i >= 0; i--) {
            const tag = {...tags[i]}, own = after(wordsOf(tag.name));
            const goes = words[i] === '' || words[i] === fresh;
            if (goes && text.startsWith(own, tag.end)) tag.end += own.length;
            text = replaced(text, tag, words[i]);
        }
        return placed ? text : (text && !/\s$/.test(text) ? `${text} ` : text) + fresh;
    }

    // ---- the buttons on the cards -----------------------------------------------------------------

    // What the card's own click would write: {weight, words, negative}, the person's preferred weight
    // for this file or the one of the Settings page, and the activation and negative text. The click's
    // code is the host's; it runs here with another `cardClicked`, which only looks.
    function ownClick(card) {
        let text = '', negative = '';
        try {
            new Function('cardClicked', card.getAttribute('onclick') ?? '')(
                (_tab, toAdd, toAddNegative) => { text = toAdd; negative = toAddNegative; });
        } catch (error) {
            console.warn('K-LoRA: the card is not read', error);
        }
        const tag = /^\s*<lora:[^>]*:([-+.\d]+)>\s*/.exec(text);
        return {
            weight: tag ? tag[1] : opts.extra_networks_default_multiplier ?? 1,
            words: tag ? text.slice(tag[0].length).trim() : '',
            negative: negative.trim(),
        };
    }

    const translated = (text) => (window.localization || {})[text] || text;
    const prompt = (tab) => gradioApp().querySelector(`#${tab}_prompt textarea`);
    const namesIn = (text) => tagsOf(text).map((tag) => tag.name);

    // Writes a text as a hand would, so that Ctrl+Z takes it back; whatever had the focus keeps it.
    function write(area, text) {
        const old = area.value, active = document.activeElement;
        let start = 0, end = 0;
        while (start < Math.min(old.length, text.length) && old[start] === text[start]) start++;
        while (end < Math.min(old.length, text.length) - start &&
            old[old.length - 1 - end] === text[text.length - 1 - end]) end++;
        const fresh = text.slice(start, text.length - end);
        area.focus({preventScroll: true});
        area.setSelectionRange(start, old.length - end);
        document.execCommand(fresh ? 'insertText' : 'delete', false, fresh);
        if (area.value !== text) area.value = text; // a browser that cannot, or a field that is not shown
        if (active !== area && active && active.focus) active.focus({preventScroll: true});
        updateInput(area);
    }

    // A click on a card's button: the prompt, and the negative text of the LoRAs that came or went.
    function clickRole(tab, card, role) {
        const cards = new Map([...card.parentElement.querySelectorAll('.card[data-name]')].map(
            (other) => [other.dataset.name, other]));
        const own = (name) => cards.has(name) ? ownClick(cards.get(name)) : {words: '', negative: ''};
        const {name} = card.dataset, area = prompt(tab), before = area.value;
        const text = clicked(before, name, role, own(name).weight, (of) => own(of).words);
        write(area, text);
        const negativeArea = gradioApp().querySelector(`#${tab}_neg_prompt textarea`);
        const separator = opts.extra_networks_add_text_separator ?? ' ';
        let negative = negativeArea.value;
        for (const gone of namesIn(before).filter((of) => !namesIn(text).includes(of))) {
            const words = own(gone).negative;
            if (words) negative = negative.replace(separator + words, '').replace(words, '');
        }
        for (const come of namesIn(text).filter((of) => !namesIn(before).includes(of))) {
            const words = own(come).negative;
            if (words && !negative.includes(words)) negative += (negative && separator) + words;
        }
        if (negative !== negativeArea.value) write(negativeArea, negative);
        showState(tab);
    }

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

    // Hundreds of cards are one stop of the Tab key, from which the arrow keys lead on: of all the
    // buttons one is in the tab order, the last that had the focus. The host's search hides cards.
    const isShown = (button) => !button.closest('.card').classList.contains('hidden');
    const buttonsIn = (tab, more = '') =>
        [...gradioApp().querySelectorAll(`#${tab}_lora_cards .klora-role${more}`)];

    function stopAt(tab, button) {
        for (const other of buttonsIn(tab, '[tabindex="0"]')) if (other !== button) other.tabIndex = -1;
        if (button && button.tabIndex !== 0) button.tabIndex = 0;
    }

    function keepStop(tab) {
        const [stop] = buttonsIn(tab, '[tabindex="0"]');
        if (!stop || !isShown(stop)) stopAt(tab, buttonsIn(tab).find(isShown));
    }

    // Left and right: the button before and behind; up and down: the same one of another card.
    function moveFocus(tab, event) {
        if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
        const all = buttonsIn(tab).filter(isShown), at = all.indexOf(event.currentTarget);
        const to = {
            ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - 2, ArrowDown: at + 2,
            Home: 0, End: all.length - 1,
        }[event.key];
        if (to === undefined) return;
        event.preventDefault(); // the page would scroll
        if (all[to]) all[to].focus();
    }

    function roleButton(tab, card, role) {
        const button = document.createElement('button');
        button.type = 'button';
        button.tabIndex = -1;
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
            clickRole(tab, card, role);
        });
        button.addEventListener('focus', () => stopAt(tab, button));
        button.addEventListener('keydown', (event) => {
            event.stopPropagation();
            moveFocus(tab, event);
        });
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
            keepStop(tab);
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
        const {selectionStart: from, selectionEnd: to} = area;
        // Also at its edges, where it was typed a moment ago: the host would tear it apart. A tag
        // within a longer selection is the host's, which puts the whole in brackets.
        const tag = tagsOf(area.value).find(
            ({start, end}) => start <= to && from <= end && !(from < start && end < to));
        if (!tag) return;
        event.preventDefault();
        event.stopPropagation(); // the host would change what stands after the last colon
        const step = Number(opts.keyedit_precision_extra) || 0.05;
        const text = reweighted(area.value, tag, event.key === 'ArrowUp' ? step : -step);
        const longer = text.length - area.value.length;
        write(area, text);
        // Behind the tag one stays there.
        area.setSelectionRange(...[from, to].map((at) => at >= tag.end ? at + longer : at));
    }

    document.addEventListener('keydown', editWeight, true);
    document.addEventListener('input', (event) => {
        const place = event.target.closest && event.target.closest('#txt2img_prompt, #img2img_prompt');
        if (place) showState(place.id.split('_')[0]);
    });
    onAfterUiUpdate(addButtons);
})();
