// The small picture of the schedule in the accordion, drawn in the browser so that it keeps up with
// the sliders: S(t), where the subject is favoured below 1 and the style above; or the share of the
// layers that the subject gets. And which sliders are shown, because each scale has its own.

(function() {
    if (window.kloraSchedule) return; // a second copy of the extension
    window.kloraSchedule = true;

    const WIDTH = 240, HEIGHT = 96, LEFT = 24, BOTTOM = 16, POINTS = 120;

    function scaleAt(t, alpha, beta, scale) {
        if (scale === 'none') return 1;
        const s = alpha * t + beta;
        return scale === 'S*' && alpha > 0 ? s % alpha : s;
    }

    const x = (t) => LEFT + (WIDTH - LEFT - 4) * t;

    // `below` and `above`: the areas where the subject and the style go; `mark`: a label of the axis,
    // at the height `at`; `falls`: where the line leaves room for the words.
    function framed(below, above, path, mark, at, falls) {
        const low = HEIGHT - BOTTOM, right = x(1);
        const word = (text, y, isRight) => isRight ?
            `<text x="${right - 4}" y="${y}" text-anchor="end">${text}</text>` :
            `<text x="${LEFT + 4}" y="${y}">${text}</text>`;
        return `<svg viewBox="0 0 ${WIDTH} ${HEIGHT}">` +
            `<path class="klora-above" d="${above}Z"/><path class="klora-below" d="${below}Z"/>` +
            word('style', 14, falls) + word('subject', low - 4, !falls) +
            `<text x="${LEFT - 4}" y="${at + 3}" text-anchor="end">${mark}</text>` +
            `<text x="${LEFT}" y="${HEIGHT - 3}">t = 0</text>` +
            `<text x="${right}" y="${HEIGHT - 3}" text-anchor="end">1</text>` +
            `<path class="klora-line" d="${path}"/></svg>`;
    }

    function shareSvg(start, end) {
        const low = HEIGHT - BOTTOM;
        const y = (percent) => 4 + (low - 4) * (1 - percent / 100);
        const line = `M${x(0)} ${y(start)}L${x(1)} ${y(end)}`;
        return framed(`${line}V${low}H${LEFT}`, `${line}V4H${LEFT}`, line, '½', y(50), end <= start);
    }

    function svg(alpha, beta, scale) {
        const values = [];
        for (let i = 0; i <= POINTS; i++) values.push(scaleAt(i / POINTS, alpha, beta, scale));
        const top = Math.max(2, ...values) * 1.05;
        const low = HEIGHT - BOTTOM, right = x(1);
        const y = (s) => 4 + (low - 4) * (1 - s / top);
        let path = '';
        values.forEach((s, i) => {
            // S* jumps where it wraps: the line is broken there.
            const jump = i === 0 || s < values[i - 1] - alpha / 2;
            path += `${jump ? 'M' : 'L'}${x(i / POINTS).toFixed(1)} ${y(s).toFixed(1)}`;
        });
        const box = (from, to) => `M${LEFT} ${from}H${right}V${to}H${LEFT}`;
        return framed(box(y(1), low), box(4, y(1)), path, '1', y(1), false);
    }

    // Whatever writes into the input: a hand, a paste, “Paper defaults”. A Gradio event would
    // do too, but it re-renders the whole page, at every move of a slider.
    function watch(input, property, changed) {
        const {get, set} = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, property);
        Object.defineProperty(input, property, {
            configurable: true,
            get,
            set(value) {
                set.call(this, value);
                changed();
            },
        });
        input.addEventListener('input', changed);
    }

    function follow(part) {
        const place = part('schedule').querySelector('.klora-schedule');
        const numbers = ['alpha', 'beta', 'share_start', 'share_end'].map(
            (name) => part(name).querySelector('input[type=number]'));
        drawLater(part('scale'), numbers, (scale) => {
            const [alpha, beta, start, end] = numbers.map((input) => Number(input.value));
            place.innerHTML = scale === 'share' ? shareSvg(start, end) : svg(alpha, beta, scale);
            part('schedule').closest('.klora-schedule-row').dataset.scale = scale;
        });
        if (!part('hires_scale')) return; // img2img has no hires pass
        drawLater(part('hires_scale'), [], (scale) => {
            part('advanced').dataset.scale = scale;
        });
    }

    // Calls `draw` with the chosen scale now and after every change, at most once a frame.
    function drawLater(scalePart, numbers, draw) {
        const scales = [...scalePart.querySelectorAll('input')];
        let waits = false;
        function drawNow() {
            waits = false;
            const chosen = scales.find((input) => input.checked);
            draw(chosen && chosen.value);
        }
        function drawSoon() {
            if (!waits) requestAnimationFrame(drawNow);
            waits = true;
        }
        for (const input of numbers) watch(input, 'value', drawSoon);
        for (const input of scales) watch(input, 'checked', drawSoon);
        drawNow();
    }

    // A person who picks a scale gets its own β, that of the Settings page. Not done by the page's
    // components, because there a pasted scale counts as picked (Gradio 4), and would undo the pasted β.
    function bringBeta(part, prefix) {
        part(`${prefix}scale`).addEventListener('change', (event) => {
            if (event.target.value === 'share') return;
            const name = event.target.value === 'S*' ? 'klora_beta_s_star' : 'klora_beta';
            const defaults = JSON.parse(part('schedule').querySelector('.klora-schedule').dataset.defaults);
            const input = part(`${prefix}beta`).querySelector('input[type=number]');
            input.value = opts[name] ?? defaults[name];
            updateInput(input);
        });
    }

    onUiLoaded(() => {
        for (const tab of ['txt2img', 'img2img']) {
            const part = (name) => gradioApp().querySelector(`#script_${tab}_klora_${name}`);
            if (!part('schedule')) continue;
            bringBeta(part, '');
            if (part('hires_scale')) bringBeta(part, 'hires_'); // img2img has no hires pass
            follow(part);
        }
    });
})();
