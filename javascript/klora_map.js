// The selection map of a report: which layer and step is under the pointer, the finger or the arrow
// keys, what it gets, and why. lib_klora/map_html.py writes the data.

(function() {
    if (window.kloraMap) return; // a second copy of the extension
    window.kloraMap = true;

    const MOST_RUNS = 6; // that are listed
    const ROLES = {n: 'neither', c: 'content', s: 'style', b: 'both'};
    const translated = (text) => (window.localization || {})[text] || text;
    const read = new WeakMap(); // map → its data, with the cell that is shown

    function dataOf(map) {
        if (read.has(map)) return read.get(map);
        let before = [];
        const layers = map.dataset.layers.split(' ').map((coded) => {
            const at = coded.indexOf(':');
            const rest = coded.slice(at + 1).split('_');
            before = [...before.slice(0, Number(coded.slice(0, at))), ...rest];
            return before.join('_');
        });
        const runs = map.dataset.runs.split(' ').map((row) => {
            let step = 0;
            return [...row.matchAll(/([a-zA-Z])(\d*)/g)].map(([, letter, count]) => {
                const first = step + 1;
                step += Number(count || 1);
                return {letter, first, last: step};
            });
        });
        const ratios = map.dataset.ratios === undefined ? [] : map.dataset.ratios.split(' ');
        const steps = runs.length ? runs[0][runs[0].length - 1].last : 0;
        const data = {layers, runs, ratios, steps, row: 0, step: 1};
        read.set(map, data);
        return data;
    }

    const roleAt = (runs, step) => runs.find((run) => step <= run.last).letter;

    function shareOf(data, step) {
        const letters = data.runs.map((runs) => roleAt(runs, step)).filter((x) => x >= 'a');
        const content = letters.filter((x) => x === 'c' || x === 'b').length;
        return letters.length ? `${Math.round(100 * content / letters.length)} %` : null;
    }

    function words(data) {
        const {row, step} = data;
        const span = ({first, last}) => first === last ? `${first}` : `${first}–${last}`;
        const named = (letter) => translated(ROLES[letter.toLowerCase()]);
        const all = data.runs[row];
        const runs = all.length <= MOST_RUNS ?
            all.map((run) => `${named(run.letter)} ${span(run)}`).join(' → ') :
            `${named(roleAt(all, step))} · ${translated('changes')}: ${all.length - 1}`;
        const ratio = data.ratios[row] ? `S_c/(γ·S_s) = ${data.ratios[row]}` : '';
        const alone = data.runs[row][0].letter < 'a' ? translated('in one file only') : '';
        const share = shareOf(data, step);
        const column = `${translated('step')} ${step}` +
            (share === null ? '' : `: ${translated('content')} ${share}`);
        return [data.layers[row], [runs, ratio, alone].filter(Boolean).join(' · '), column];
    }

    function show(map, row, step) {
        const data = dataOf(map);
        if (!data.steps) return;
        data.row = Math.min(Math.max(row, 0), data.layers.length - 1);
        data.step = Math.min(Math.max(step, 1), data.steps);
        const cells = map.querySelector('.klora-map-cells');
        let mark = cells.querySelector('b');
        if (!mark) mark = cells.appendChild(document.createElement('b'));
        const part = (n, of) => `${100 * n / of}%`;
        mark.style.left = part(data.step - 1, data.steps);
        mark.style.top = part(data.row, data.layers.length);
        mark.style.width = part(1, data.steps);
        mark.style.height = part(1, data.layers.length);
        const told = map.querySelector('.klora-map-told');
        told.replaceChildren(...words(data).flatMap(
            (line, i) => i ? [document.createElement('br'), line] : [line]));
    }

    function pointed(event) {
        const cells = event.target.closest && event.target.closest('.klora-map-cells');
        if (!cells) return;
        const map = cells.closest('.klora-map'), data = dataOf(map);
        const box = cells.getBoundingClientRect();
        show(map, Math.floor((event.clientY - box.top) / box.height * data.layers.length),
            1 + Math.floor((event.clientX - box.left) / box.width * data.steps));
    }

    function pressed(event) {
        const map = event.target;
        if (!map.classList || !map.classList.contains('klora-map')) return;
        const {row, step, layers, steps} = dataOf(map);
        const page = Math.max(1, Math.round(layers.length / 12));
        const to = {
            ArrowUp: [row - 1, step], ArrowDown: [row + 1, step],
            ArrowLeft: [row, step - 1], ArrowRight: [row, step + 1],
            PageUp: [row - page, step], PageDown: [row + page, step],
            Home: [row, 1], End: [row, steps],
        }[event.key];
        if (!to || event.ctrlKey || event.altKey || event.metaKey) return;
        event.preventDefault();
        show(map, ...to);
    }

    document.addEventListener('pointermove', pointed);
    document.addEventListener('pointerdown', pointed);
    document.addEventListener('keydown', pressed);
    document.addEventListener('focusin', (event) => {
        const map = event.target;
        if (map.matches && map.matches('.klora-map') && map.matches(':focus-visible')) {
            show(map, dataOf(map).row, dataOf(map).step);
        }
    });
})();
