"""report.html in a real browser: nothing fetched, every picture drawn, both colour schemes, no page wider than a
phone."""
import io, shutil

import numpy as np
import pytest
import torch
from craft_nb.evaluate import hidden_drift, rate, render_report

chromium = shutil.which('chromium') or shutil.which('google-chrome') or shutil.which('chromium-browser')


def example():
    g = torch.Generator().manual_seed(0)
    t = torch.randn(12, 2, 2, 8, generator=g)
    drift = hidden_drift(t + 0.3 * torch.randn(t.shape, generator=g), t, [-2, -1],
                         ['vision_token_mean', 'text_token_last'])
    def row(*s): return dict(zip(('teacher', 'sft', 'origin', 'craft:action_logits'), (rate(x, 20) for x in s)))
    return dict(tasks=dict(old=['drawer-close', 'button-press'], new=['window-open']), minutes=1.0,
                drift=dict(sft=drift), success={'drawer-close': row(20, 1, 8, 19), 'button-press': row(19, 1, 3, 17),
                                                'window-open': row(0, 17, 16, 15)},
                step_seconds={'sft': .2, 'craft:action_logits': .3},
                settings={'seed': 0, 'note': '<script>alert(1)</script>'},
                views=dict(action_logits=dict(arm='craft:action_logits', bytes_per_anchor=1536, build_seconds=9.5)),
                blind={'window-open': dict(grey=rate(0, 20), constant=rate(1, 20))}, stages=dict(record=.5, train=.5))


def gif():
    from PIL import Image
    frames = [Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)) for i in range(3)]
    frames[0].save(out := io.BytesIO(), format='GIF', save_all=True, append_images=frames[1:], duration=100, loop=0)
    return out.getvalue()


@pytest.mark.timeout(120)
def test_report_in_a_browser(tmp_path):
    assert chromium, 'no Chromium: apt-get install chromium'
    from playwright.sync_api import sync_playwright
    rows = [{'step': i, 'lambda': i / 10, 'epsilon': .1, 'violation': .1 - i / 50, 'cosine': -.2} for i in range(10)]
    clips = {'drawer-close': {'sft': gif(), 'craft:action_logits': gif()}}
    page_file = render_report(example(), {'craft:action_logits': rows}, clips, tmp_path)
    asked, said, seen = [], [], {}
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium,
                                    args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        for scheme in 'light', 'dark':
            context = browser.new_context(color_scheme=scheme, viewport=dict(width=390, height=800), offline=True)
            page = context.new_page()
            page.on('request', lambda r: asked.append(r.url))
            page.on('console', lambda m: said.append(m.text))
            page.on('dialog', lambda d: (said.append(d.message), d.dismiss()))
            page.goto(page_file.as_uri())
            seen[scheme] = page.evaluate('''() => ({
                ink: getComputedStyle(document.querySelector('svg text')).fill,
                paper: getComputedStyle(document.body).backgroundColor,
                pictures: [...document.images].map(i => i.naturalWidth), charts: document.querySelectorAll('svg').length,
                heads: [...document.querySelectorAll('h2')].map(h => h.textContent),
                wide: document.documentElement.scrollWidth})''')
        browser.close()
    assert [u for u in asked if not u.startswith(('file:', 'data:'))] == [] and said == []
    for s in seen.values():
        assert s['pictures'] == [16, 16] and s['charts'] == 3 and s['wide'] <= 390
        assert s['heads'] == [
            'What was kept, what was learned', 'The same skill, side by side', 'Views', 'How the budget was held',
            'Where the network moved', 'Could it be luck?', 'How it was run']
    assert seen['light']['paper'] != seen['dark']['paper'] and seen['light']['ink'] != seen['dark']['ink']


def test_same_skill_needs_no_clips(tmp_path):
    report = ({k: v for k, v in example().items() if k in ('tasks', 'minutes', 'success', 'step_seconds')}
              | dict(drift={}))
    text = render_report(report, {}, {}, tmp_path).read_text()
    assert 'side by side' not in text and 'Where the network moved' not in text and 'What was kept' in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ['report.html', 'report.json', 'success.png']


def test_a_wrong_report_writes_nothing(tmp_path):
    report = example()
    del report['success']['window-open']['sft']
    with pytest.raises(ValueError, match=r"success\[window-open\]: no cell for arm 'sft'"):
        render_report(report, {}, {}, tmp_path/'new')
    assert not (tmp_path/'new').exists()
