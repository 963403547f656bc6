// The small picture of S(t) in the accordion, drawn in the browser so that it keeps up with the
// sliders. Where S is below 1 the subject is favoured, above it the style.

(function() {
    const WIDTH = 240, HEIGHT = 96, LEFT = 24, BOTTOM = 16, POINTS = 120;

    function scaleAt(t, alpha, beta, scale) {
        if (scale === 'none') return 1;
        const s = alpha * t + beta;
        return scale === 'S*' && alpha > 0 ? s % alpha : s;
    }

    function svg(alpha, beta, scale) {
        const values = [];
        for (let i = 0; i <= POINTS; i++) values.push(scaleAt(i / POINTS, alpha, beta, scale));
        const top = Math.max(2, ...values) * 1.05;
        const x = (i) => LEFT + (WIDTH - LEFT - 4) * i / POINTS;
        const y = (s) => 4 + (HEIGHT - BOTTOM - 4) * (1 - s / top);
        let path = '';
        values.forEach((s, i) => {
            // S* jumps where it wraps: the line is broken there.
            const jump = i === 0 || s < values[i - 1] - alpha / 2;
            path += `${jump ? 'M' : 'L'}${x(i).toFixed(1)} ${y(s).toFixed(1)}`;
        });
        const one = y(1).toFixed(1), right = x(POINTS), low = y(0);
        return `<svg viewBox="0 0 ${WIDTH} ${HEIGHT}">` +
            `<rect class="klora-above" x="${LEFT}" y="4" width="${right - LEFT}" height="${one - 4}"/>` +
            `<rect class="klora-below" x="${LEFT}" y="${one}" width="${right - LEFT}" height="${low - one}"/>` +
            `<text x="${LEFT + 4}" y="14">style</text>` +
            `<text x="${right - 4}" y="${low - 4}" text-anchor="end">subject</text>` +
            `<text x="${LEFT - 4}" y="${+one + 3}" text-anchor="end">1</text>` +
            `<text x="${LEFT}" y="${HEIGHT - 3}">t = 0</text>` +
            `<text x="${right}" y="${HEIGHT - 3}" text-anchor="end">1</text>` +
            `<path d="${path}"/></svg>`;
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
        const [alpha, beta] = ['alpha', 'beta'].map(
            (name) => part(name).querySelector('input[type=number]'));
        const scales = [...part('scale').querySelectorAll('input')];
        let waits = false;
        function draw() {
            waits = false;
            const chosen = scales.find((input) => input.checked);
            place.innerHTML = svg(Number(alpha.value), Number(beta.value), chosen && chosen.value);
        }
        function drawSoon() {
            if (!waits) requestAnimationFrame(draw);
            waits = true;
        }
        for (const input of [alpha, beta]) watch(input, 'value', drawSoon);
        for (const input of scales) watch(input, 'checked', drawSoon);
        draw();
    }

    // A person who picks a scale gets its own β. Not done by the page's components, because there a
    // pasted scale counts as picked (Gradio 4), and would undo the pasted β.
    function bringBeta(part, prefix) {
        part(`${prefix}scale`).addEventListener('change', (event) => {
            const {beta, betaSStar} = part('schedule').querySelector('.klora-schedule').dataset;
            const input = part(`${prefix}beta`).querySelector('input[type=number]');
            input.value = event.target.value === 'S*' ? betaSStar : beta;
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
