"The page on which suspects are decided, in a browser."
import html, json, os, re, shutil, subprocess, numpy as np, pandas as pd, pytest
from pathlib import Path
from fastai_jocor.files import read_table
from fastai_jocor.lab.page import page
from fastai_jocor.lab.suspects_page import review_page

def test_a_page_without_a_script_may_run_none():
    policy = lambda text: re.search(r'Content-Security-Policy" content="(.*?)"', text)[1]
    assert 'script-src' not in policy(page('t', 'b')) and 'script-src' in policy(page('t', 'b', script='1'))
    assert all("default-src 'none'" in policy(page('t', 'b', script=o)) for o in ('', '1'))

BROWSER = next((b for b in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if b), None)
needs_browser = pytest.mark.skipif(BROWSER is None or os.name != 'posix', reason='Chromium is not installed')

def in_browser(page, script, tmp_path):
    "Open a page with a script at its end, and return what this gives"
    show = 'document.getElementById("out").textContent = JSON.stringify'
    run = f'try {{ {show}((() => {{ {script} }})()); }} catch (e) {{ {show}("error: " + e); }}'
    text = page.read_text(encoding='utf-8').replace('</body>', f'<pre id="out"></pre><script>{run}</script></body>')
    (tmp_path/'page.html').write_text(text, encoding='utf-8')
    options = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking',
               f'--user-data-dir={tmp_path/"profile"}', '--dump-dom', (tmp_path/'page.html').as_uri()]
    p = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', p.stdout, re.S)[1]))

USE_THE_PAGE = '''
    const cards = () => [...document.querySelectorAll("article")];
    const first = cards()[0].textContent, start = cards().length;
    const scores = cards().map(c => parseFloat(c.querySelectorAll("small")[1].textContent.slice(6)));
    $("pair").value = $("pair").options[1].value; $("pair").onchange();
    const legends = [...new Set(cards().map(c => c.querySelector("legend").textContent))];
    const radios = cards()[0].querySelectorAll("input"); radios[1].checked = true; radios[1].onchange();
    cards()[1].querySelectorAll("input")[2].onchange();
    $("sort").value = "item"; $("sort").onchange();
    const res = {first, start, legends, count: $("count").textContent, csv: csv(),
        descending: scores.every((s, i) => !i || s <= scores[i-1]),
        markup: document.querySelectorAll("article script, article b, #bad b, #note i, img[onerror]").length,
        scripts: document.scripts.length, options: $("pair").options.length,
        bad: $("bad").textContent, note: $("note").textContent, after: cards().length};
    $("all").onclick();
    return {...res, all: $("count").textContent};'''

@needs_browser
def test_the_page_in_a_browser(tmp_path):
    n = 10_000
    names = ['<script>alert(1)</script>', '=cat', 'dog "x"']
    rows = [(f"""it's "{i}" <img src=x onerror=alert(1)>.png""", names[i%3], names[(i+1)%3]) for i in range(n)]
    s = pd.DataFrame(rows, columns=['item', 'given_label', 'predicted_label'])
    s = s.assign(score=np.random.RandomState(0).rand(n), evidence='e')
    s.loc[77, 'score'] = 2.
    pictures = ['data:image/jpeg;base64,AAAA']*n
    review_page(s, tmp_path/'suspects.html', bad=['<b>bad</b>.png'], note='<i>note</i>', pictures=pictures)
    got = in_browser(tmp_path/'suspects.html', USE_THE_PAGE, tmp_path)
    best = s.loc[77]
    assert got['first'].startswith(f'{best.given_label} → {best.predicted_label}') and best['item'] in got['first']
    assert 0 < got['start'] < 1000 and got['after'] < 1000 and got['descending']
    assert len(got['legends']) == 1 and got['options'] == 4 and got['markup'] == 0 and got['scripts'] == 3
    assert '<b>bad</b>.png' in got['bad'] and got['note'] == '<i>note</i>'
    shown = int(got['count'].split()[0])
    assert shown in (n//3, n//3+1) and got['count'] == f'{shown} of {n} suspects, 2 decided'
    assert got['all'] == f'{shown} of {n} suspects, {shown} decided'
    (tmp_path/'reviewed.csv').write_text(got['csv'], newline='')
    r,columns = read_table(tmp_path/'reviewed.csv'),['item', 'given_label', 'predicted_label']
    assert list(r) == ['position', *columns, 'decision'] and sorted(r.decision) == ['drop', 'relabel']
    assert r[columns].values.tolist() == s.loc[r.position.astype(int), columns].values.tolist()
    assert '://' not in (tmp_path/'suspects.html').read_text(encoding='utf-8')

@needs_browser
def test_the_page_fits_the_screen(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent/'tools')
    import website
    long = 'a_name_without_a_place_to_break_it_'*6
    labels = dict(given_label=[long, 'cat', 'dog']*30, predicted_label=['dog', long, 'cat']*30)
    s = pd.DataFrame(dict(item=[f'{i}{long}.png' for i in range(90)], score=np.arange(90.), **labels))
    s = s.assign(evidence='9 of 10 votes against it')
    picture = 'data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs='
    review_page(s, tmp_path/'suspects.html', bad=[f'{long}.png'], note=long*2, pictures=['', picture, '']*30)
    chrome = website.Chrome(BROWSER, tmp_path/'profile')
    try:
        chrome.open()
        for width,dark in ((390, False), (1280, False), (1280, True)):
            messages,wide,_ = chrome.visit((tmp_path/'suspects.html').as_uri(), width, dark)
            assert messages == [] and wide <= width
    finally: chrome.close()
