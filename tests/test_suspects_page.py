"The page on which suspects are decided, by keys and clicks in a browser."
import io, json, shutil, subprocess, sys, numpy as np, pandas as pd, pytest
from base64 import b64decode
from pathlib import Path
from PIL import Image
from fastai_jocor.files import read_table, write_table
from fastai_jocor.lab.page import page, template
from fastai_jocor.lab.review import apply_reviewed
from fastai_jocor.lab.suspects_page import review_page, thumbnail

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tools'))
import website

needs_browser = pytest.mark.skipif(website.chromium() is None, reason='Chromium is not installed')
GIF = 'data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs='
COLUMNS = ['item', 'given_label', 'predicted_label', 'decision']
VIRTUAL = dict(Enter=13, Escape=27, Tab=9, ArrowRight=39, ArrowLeft=37, ArrowDown=40, ArrowUp=38)
KEY_TEXT = dict(Enter='\r', Tab='', Escape='')

class Browser(website.Chrome):
    "A browser that is used by keys"
    def see(self, page, width=1280, dark=False):
        "Open a page and return what the console says and how wide it is"
        messages,wide,*_ = self.visit(Path(page).as_uri(), width, dark)
        return messages,wide

    def js(self, expression):
        got = self.call('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in got: raise RuntimeError(got['exceptionDetails'])
        return got['result'].get('value')

    def press(self, *keys):
        for key in keys:
            text = '' if key in VIRTUAL else key
            code = VIRTUAL.get(key) or (ord(key.upper()) if key.isalnum() else 0)
            params = dict(key=key, windowsVirtualKeyCode=code, modifiers=8 if key.isupper() and len(key) == 1 else 0)
            self.call('Input.dispatchKeyEvent', type='keyDown', text=KEY_TEXT.get(key, text), **params)
            self.call('Input.dispatchKeyEvent', type='keyUp', **params)
        self.js('new Promise(o => setTimeout(o, 20))') # a dialog tells that it was closed in a task of its own

    def text(self, name): return self.js(f'$({name!r}).textContent')
    def is_open(self, name): return self.js(f'$({name!r}).open')
    def current(self): return self.js('current && current.item')

    def decided(self):
        "What would be exported"
        return [line[-4:] for line in self.js('parse(csv())')[1:]]

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    chrome = Browser(website.chromium(), tmp_path_factory.mktemp('profile'))
    try:
        chrome.open()
        yield chrome
    finally: chrome.close()

@pytest.fixture
def chrome(browser):
    "The browser, with nothing kept in it"
    yield browser
    browser.js('localStorage.clear()')

def table(n=5, **columns):
    "Suspects a.png, b.png, … of three classes, the most suspect first"
    names = ['cat', 'dog', 'bird']
    s = dict(item=[f'{i:05}.png' for i in range(n)], given_label=[names[i%3] for i in range(n)])
    s |= dict(predicted_label=[names[(i+1)%3] for i in range(n)], evidence='9 of 10 votes')
    return pd.DataFrame(s | dict(score=np.arange(n, 0, -1.)) | columns)

def write(tmp_path, s, name='suspects.html', **kwargs):
    review_page(s, tmp_path/name, pictures=kwargs.pop('pictures', [GIF]*len(s)), **kwargs)
    return tmp_path/name

def test_a_page_without_a_script_may_run_none():
    def policy(text): return text.partition('Content-Security-Policy" content="')[2].partition('"')[0]
    assert 'script-src' not in policy(page('t', 'b')) and 'script-src' in policy(page('t', 'b', script='1'))
    assert all("default-src 'none'" in policy(page('t', 'b', script=o)) for o in ('', '1'))

# decisions by keys

@needs_browser
def test_decisions_by_keys_alone(chrome, tmp_path):
    s = table(6)
    assert chrome.see(write(tmp_path, s)) == ([], 1280)
    chrome.press('k', 'r', 'd')
    assert chrome.decided() == [[*s.iloc[i, :3], o] for i,o in enumerate(('keep', 'relabel', 'drop'))]
    assert chrome.current() == s['item'][3] and '3 of 6 decided (1 keep, 1 relabel, 1 drop)' in chrome.text('count')
    chrome.press('n', 'p', 'p', 'p')
    assert chrome.current() == s['item'][1]
    chrome.press('u')
    assert chrome.current() == s['item'][2] and [o[-1] for o in chrome.decided()] == ['keep', 'relabel']
    chrome.press('u', 'u', 'u')
    assert chrome.decided() == [] and 'nothing to undo' in chrome.text('said')
    chrome.press('?')
    assert chrome.is_open('help') and 'relabel as predicted' in chrome.text('all-keys')
    chrome.press('k', 'Escape')
    assert not chrome.is_open('help') and chrome.decided() == []
    assert 'relabel as predicted' in chrome.text('keys')

@needs_browser
def test_a_press_again_takes_a_click_back(chrome, tmp_path):
    chrome.see(write(tmp_path, table(2)))
    click = lambda act: chrome.js(f'cards.get(rows[1]).querySelector("[data-act={act}]").click()')
    click('drop')
    assert chrome.decided()[0][-1] == 'drop' and chrome.current() == '00001.png'
    click('drop')
    assert chrome.decided() == []
    chrome.press('k', 'k', 'c')
    assert chrome.decided() == []

@needs_browser
def test_the_enlarged_view(chrome, tmp_path):
    chrome.see(write(tmp_path, table(3, true_label=['dog', '', 'cat'])))
    chrome.press('e')
    assert chrome.is_open('large') and '00000.png' in chrome.text('large')
    assert 'true label: dog' in chrome.text('large')
    chrome.press('k', 'ArrowRight')
    assert '00002.png' in chrome.text('large') and chrome.js('document.activeElement.dataset.act') == 'next'
    chrome.press('p', 'd', 'Escape')
    assert not chrome.is_open('large') and chrome.current() == '00002.png'
    assert chrome.js('document.activeElement === cards.get(current)')
    assert [o[-1] for o in chrome.decided()] == ['keep', 'drop']

@needs_browser
def test_any_class_can_be_the_new_label(chrome, tmp_path):
    s = table(3)
    labels = pd.DataFrame(dict(file=[*s['item'], 'x.png'], label=[*s.given_label, 'fish, "wet"']))
    chrome.see(write(tmp_path, s, labels=labels, root=tmp_path))
    chrome.press('l', *'WET')
    assert chrome.is_open('choose') and chrome.js('$("labels").children.length') == 1
    chrome.press('Enter')
    assert not chrome.is_open('choose') and chrome.decided() == [['00000.png', 'cat', 'fish, "wet"', 'relabel']]
    assert chrome.current() == '00001.png' and 'fish' in chrome.js('$("list").textContent')
    reviewed = pd.DataFrame(chrome.decided(), columns=COLUMNS)
    write_table(reviewed, tmp_path/'reviewed.csv', index=False)
    new = apply_reviewed(labels, read_table(tmp_path/'reviewed.csv'))
    assert new.label.tolist() == ['fish, "wet"', *labels.label[1:]]

@needs_browser
def test_a_prediction_that_is_the_given_label(chrome, tmp_path):
    chrome.see(write(tmp_path, table(2, predicted_label='cat', note='unlike all others')))
    chrome.press('r')
    assert chrome.is_open('choose') and chrome.decided() == []
    chrome.press('Escape')
    chrome.press('R', 'Enter')
    assert [o[0] for o in chrome.decided()] == ['00001.png']

@needs_browser
@pytest.mark.parametrize('key,what', [('K', 'keep'), ('R', 'relabel'), ('D', 'drop')])
def test_many_decisions_are_asked_for_and_undone(key, what, chrome, tmp_path):
    chrome.see(write(tmp_path, table(70)))
    chrome.press('d', key)
    assert chrome.is_open('ask') and '69 undecided of the 70 suspects' in chrome.text('question')
    chrome.press('Escape')
    assert not chrome.is_open('ask') and len(chrome.decided()) == 1
    chrome.press(key, 'Enter')
    assert [o[-1] for o in chrome.decided()] == ['drop', *[what]*69]
    chrome.press('u')
    assert [o[-1] for o in chrome.decided()] == ['drop']
    chrome.press(key)
    chrome.js('$("decided").click()')
    chrome.press('Enter')
    assert [o[-1] for o in chrome.decided()] == [what]*70

@needs_browser
def test_decisions_are_kept_in_the_browser(chrome, tmp_path):
    file = write(tmp_path, table(3))
    chrome.see(file)
    chrome.press('k', 'd')
    want = chrome.decided()
    chrome.see(file)
    assert chrome.decided() == want and len(want) == 2
    chrome.see(write(tmp_path, table(3, given_label='other')))
    assert chrome.decided() == []

# reviewed.csv

ODD = ['<b>bold</b>', 'nan', 'None', '__proto__', 'constructor', 'it\'s "quoted"\nin two lines',
       '</script><script>ran = 1</script>', '=1+1', "'", ' spaces ', 'a → b', '1,5', '\u2028',
       '<img src=x onerror=ran=1>']

@needs_browser
def test_odd_names_stay_text(chrome, tmp_path):
    s = table(len(ODD), item=ODD, given_label=ODD, predicted_label=ODD[1:]+ODD[:1], note=ODD, evidence=ODD, part=ODD,
              text=ODD)
    labels = pd.DataFrame(dict(file='x.png', label=ODD))
    summary = dict.fromkeys(('title', 'date', 'command', 'version', 'warning', 'next_command'), ODD[-1])
    file = write(tmp_path, s, labels=labels, root=tmp_path, bad=ODD, note=ODD[0], summary=summary)
    assert chrome.see(file)[0] == []
    assert chrome.js('rows.map(r => r.given_label)') == ODD and chrome.text('note') == ODD[0]
    assert chrome.js('document.scripts.length') == 2 and chrome.js('document.title') == ODD[-1]
    chrome.press('e')
    assert chrome.js('document.querySelectorAll("[onerror], #bad b, .card b b, #matrix b, option b").length') == 0
    assert chrome.js('typeof ran') == 'undefined'
    chrome.press('Escape', *('rkd'*5)[:len(ODD)])
    (tmp_path/'r.csv').write_text(chrome.js('csv()'), encoding='utf-8', newline='')
    assert ",'=1+1," in (tmp_path/'r.csv').read_text(encoding='utf-8') # as text for a spreadsheet
    reviewed = read_table(tmp_path/'r.csv')
    assert list(reviewed) == ['part', 'position', *COLUMNS] and reviewed['item'].tolist() == ODD
    assert reviewed.predicted_label.tolist() == s.predicted_label.tolist()
    assert reviewed.decision.tolist() == (['relabel', 'keep', 'drop']*5)[:len(ODD)]
    before = chrome.decided()
    chrome.js('localStorage.clear()')
    chrome.see(file)
    chrome.js(f'load({json.dumps((tmp_path/"r.csv").read_bytes().decode())})')
    assert chrome.decided() == before == reviewed[COLUMNS].values.tolist()
    assert '://' not in file.read_text(encoding='utf-8')

@needs_browser
def test_earlier_decisions_are_loaded(chrome, tmp_path):
    s = table(4)
    reviewed = [('00001.png', 'dog', 'fish', 'relabel'), ('00000.png', 'cat', 'dog', 'keep')]
    reviewed += [('gone.png', 'cat', 'dog', 'drop'), ('00002.png', 'cat', 'dog', 'drop')]
    reviewed += [('00003.png', 'cat', 'dog', 'maybe')]
    write_table(pd.DataFrame(reviewed, columns=COLUMNS), tmp_path/'r.csv', index=False)
    chrome.see(write(tmp_path, s))
    text = '\ufeff' + (tmp_path/'r.csv').read_text()
    load = lambda text: chrome.js(f'loadFile(new File([{json.dumps(text)}], "r.csv"))')
    chrome.press('d')
    load(text)
    assert chrome.decided() == [list(reviewed[1]), list(reviewed[0])]
    assert chrome.text('said').startswith('2 decisions loaded. 3 fit no suspect here')
    chrome.press('u')
    assert chrome.decided() == [['00000.png', 'cat', 'dog', 'drop']]
    for wrong,says in (('a,b\n1,2\n', 'no column item'), ('', 'no column item'), (text + '"', 'quotation mark')):
        load(wrong)
        assert 'cannot be loaded' in chrome.text('said') and says in chrome.text('said')
    assert len(chrome.decided()) == 1

# reviewed.csv without a browser

needs_node = pytest.mark.skipif(shutil.which('node') is None, reason='node is not installed')
STUB = """const said = {}, document = {getElementById: id => id === "data" ? {textContent: DATA} : said};
function refresh() {}
"""

def in_node(tmp_path, s, expression):
    "What the script of a page of these suspects says"
    data = write(tmp_path, s).read_text().partition('id="data">')[2].partition('</script>')[0]
    script = f'const DATA = {json.dumps(data)};\n{STUB}' + template('review_state.js') + template('review_csv.js')
    (tmp_path/'page.js').write_text(f'{script}\nconsole.log(JSON.stringify({expression}));', encoding='utf-8')
    run = subprocess.run([shutil.which('node'), tmp_path/'page.js'], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)

def loaded(tmp_path, s, *lines):
    "Positions and decisions after a file was loaded"
    text = json.dumps('\n'.join([*lines, '']))
    return dict(in_node(tmp_path, s, f'(load({text}), [...decisions].map(([i, d]) => [i, d.label || d.what]))'))

@needs_node
def test_the_part_is_exported_where_there_is_one(tmp_path):
    exported = '(decide(rows.map(r => [r, {what: "relabel", label: "x"}])), parse(csv()))'
    s = table(2).set_axis([7, 3])
    lines = [['7', '00000.png', 'cat', 'x', 'relabel'], ['3', '00001.png', 'dog', 'x', 'relabel']]
    assert in_node(tmp_path, s, exported) == [['position', *COLUMNS], *lines]
    want = [['part', 'position', *COLUMNS], ['valid', *lines[0]], ['train', *lines[1]]]
    assert in_node(tmp_path, s.assign(part=['valid','train']), exported) == want

@needs_node
def test_items_of_one_name_are_not_merged(tmp_path):
    s = table(4, item='5', given_label='cat', predicted_label='dog', part=['train','train','valid','valid'])
    s = s.set_axis([1, 2, 8, 9])
    head = 'part,position,item,given_label,predicted_label,decision'
    lines = 'train,1,5,cat,dog,keep','train,2,5,cat,fish,relabel','valid,9,5,cat,dog,drop','valid,3,5,cat,dog,drop'
    assert loaded(tmp_path, s, head, *lines) == {1: 'keep', 2: 'fish', 9: 'drop'}
    old = head.removeprefix('part,'),'2,5,cat,dog,keep','8,5,cat,dog,drop'
    assert loaded(tmp_path, s, *old) == {2: 'keep', 8: 'drop'}
    assert loaded(tmp_path, s, ','.join(COLUMNS), '5,cat,dog,keep') == {}
    assert loaded(tmp_path, s[1:3], head, 'valid,44,5,cat,dog,keep') == {8: 'keep'}
    assert loaded(tmp_path, s[1:2], head, *lines[:2]) == {2: 'fish'}

@needs_node
def test_a_name_of_one_item_is_enough(tmp_path):
    lines = '7,00001.png,dog,x,relabel','8,00000.png,dog,x,drop','9,00000.png,cat,x,keep'
    for s in (table(2), table(2, part='train')):
        assert loaded(tmp_path, s, 'position,' + ','.join(COLUMNS), *lines) == {0: 'keep', 1: 'x'}

# what is shown

@needs_browser
def test_the_order_is_that_of_the_probability(chrome, tmp_path):
    s = table(4, p_wrong=[.2, .999, np.nan, .5])
    chrome.see(write(tmp_path, s))
    assert chrome.js('rows.map(r => r.item)') == [f'0000{i}.png' for i in (1, 3, 0, 2)]
    for o in ('>99% likely wrong', '20% likely', 'score 2'): assert o in chrome.text('list')
    chrome.js('$("sort").value = "item"; $("sort").onchange()')
    assert chrome.js('shown.map(r => r.item)') == s['item'].tolist()

@needs_browser
def test_ten_thousand_suspects(chrome, tmp_path):
    n = 10_000
    s = table(n, part=['train', 'valid']*(n//2))
    s['note'] = np.where(np.arange(n)%7 == 0, [f'almost equal to {i}.png, labelled dog' for i in range(n)], '')
    assert chrome.see(write(tmp_path, s))[0] == []
    assert chrome.js('document.querySelectorAll("*").length') < 3000 and chrome.js('shown.length') == n
    chrome.press(*'k'*61)
    assert chrome.current() == '00061.png' and chrome.text('page') == 'page 2 of 167'
    assert chrome.js('document.querySelectorAll(".card").length') == 60
    def shown(name, value):
        chrome.js(f'showAll(); $({name!r}).value = {json.dumps(value)}; show()')
        return chrome.js('shown.length')
    assert shown('decision', 'undecided') == n-61 and shown('decision', 'keep') == 61
    assert shown('given', '"dog"') == (s.given_label == 'dog').sum() and shown('part', 'valid') == n/2
    noted = (s.note != '').sum()
    assert shown('noted', 'with a note') == noted == shown('noted', '"almost equal"')
    assert shown('noted', 'without a note') == n-noted
    assert shown('find', '123') == (s['item'].str.contains('123') | s.note.str.contains('123')).sum()
    chrome.js('showAll(); document.querySelector("#matrix button").click()')
    pair = chrome.js('[current.given_label, current.predicted_label]')
    assert chrome.js('shown.length') == ((s.given_label == pair[0]) & (s.predicted_label == pair[1])).sum()
    assert chrome.js('document.querySelectorAll("#matrix [aria-pressed=true]").length') == 1
    chrome.press('a')
    assert chrome.js('shown.length') == n

@needs_browser
def test_what_is_said_of_the_audit(chrome, tmp_path):
    summary = dict(title='An audit', date='May 1', command='jocor_audit x', version='0.1', n_items=np.int64(1200))
    summary |= dict(expected_wrong=31.4, low=20, high=np.float32(45), trusted=False)
    summary |= dict(next_command='jocor_audit x --apply r')
    chrome.see(write(tmp_path, table(3), summary=summary, labels=pd.DataFrame(dict(file=list('abc'), label='cat'))))
    head = chrome.js('document.querySelector("header").innerText')
    said = ['An audit', 'May 1', 'jocor_audit x', '0.1', '--apply r', 'Do not rely']
    for o in (*said, 'About 31 of 1,200 labels', 'between 20 and 45'): assert o in head, o
    assert '1 of 3 pictures' in chrome.text('classes') and '1 of 3 suspects' in chrome.text('classes')
    chrome.see(write(tmp_path, table(0)))
    head = chrome.js('document.querySelector("header").innerText')
    assert 'jocor_audit SOURCE --apply reviewed.csv' in head and 'expected' not in head and 'rely' not in head
    assert 'no suspect' in chrome.text('empty')

def test_examples_are_no_suspects_and_embedded_once(tmp_path):
    for i in range(8): Image.new('RGB', (9, 9), (20*i, 0, 0)).save(tmp_path/f'{i}.png')
    (tmp_path/'8.png').write_text('no picture')
    s = table(2, item=['0.png', '1.png'], given_label='cat', predicted_label='dog')
    labels = pd.DataFrame(dict(file=[f'{i}.png' for i in range(9)], label=['cat']*5 + ['dog']*4))
    labels['p_wrong'] = [0, 0, .9, .3, .2, .8, .5, .4, .1]
    review_page(s.rename(columns=dict(item='file')), tmp_path/'s.html', tmp_path, labels=labels)
    text = (tmp_path/'s.html').read_text()
    data = json.loads(text.partition('id="data">')[2].partition('</script>')[0])
    url = lambda i: thumbnail(tmp_path/f'{i}.png')
    assert data['classes'] == [['cat', 5, [url(i) for i in (4, 3, 2)]], ['dog', 4, [url(i) for i in (7, 6)]]]
    assert all(text.count(url(i)) == 1 for i in (2, 3, 4, 6, 7))

def test_thumbnails_are_turned_as_the_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new('RGB', (200, 100)).save(tmp_path/'a.jpg', exif=exif)
    im = Image.open(io.BytesIO(b64decode(thumbnail(tmp_path/'a.jpg', 64).partition(',')[2])))
    assert im.size == (32, 64)
    Image.new('RGB', (60, 30)).save(tmp_path/'small.jpg', exif=exif)
    im = Image.open(io.BytesIO(b64decode(thumbnail(tmp_path/'small.jpg', 64).partition(',')[2])))
    assert im.size == (30, 60)

def test_small_pictures_are_shown_as_they_are_unless_they_hold_much_else(tmp_path):
    "Compressing them once more takes time, and loses detail"
    file,side = tmp_path/'a.jpg',64
    shown = lambda: b64decode(thumbnail(file, side).partition(',')[2])
    Image.effect_noise((50, 64), 50).convert('RGB').save(file, quality=95)
    assert shown() == file.read_bytes()
    file.write_bytes(file.read_bytes() + b'x'*side**2)
    assert len(shown()) < side**2

# screens

@needs_browser
def test_the_page_fits_the_screen(chrome, tmp_path):
    long = 'a_name_without_a_place_to_break_it_'*6
    names = [long, 'cat', 'dog', *(f'{i}{long}' for i in range(9))]
    s = dict(item=[f'{i}{long}.png' for i in range(90)], note=long, part=long, evidence=long)
    s = table(90, given_label=(names*9)[:90], predicted_label=(names*9)[1:91], **s)
    labels = pd.DataFrame(dict(file=['x.png']*12, label=names))
    Image.new('RGB', (300, 200)).save(tmp_path/'x.png')
    summary = dict.fromkeys(('title', 'date', 'command', 'version', 'warning', 'next_command'), long)
    said = dict(bad=[f'{long}.png'], note=long*2, summary=summary)
    file = write(tmp_path, s, pictures=['', GIF, '']*30, labels=labels, root=tmp_path, **said)
    for width,dark in ((390, False), (1280, False), (390, True), (1280, True)):
        messages,wide = chrome.see(file, width, dark)
        assert messages == [] and wide <= width
        chrome.js('for (const o of document.querySelectorAll("details")) o.open = true')
        for key in ('e', 'l', '?', 'K'):
            chrome.press(key)
            assert chrome.js('document.documentElement.scrollWidth') <= width
            inside = 'o => o.scrollWidth <= o.clientWidth && o.getBoundingClientRect().right <= innerWidth'
            assert chrome.js(f'[...document.querySelectorAll("dialog[open]")].every({inside})'), key
            chrome.press('Escape')
