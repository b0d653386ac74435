"""Build the site as readers will see it and check it, where Quarto is not at hand: python tools/docs.py --site

The notebooks go through nbdev as they do for Quarto, and smalldocs renders the pages from the same _quarto.yml and
styles.css. Pages are then read for links, anchors, titles, results and alternative text, and opened in Chromium, where
there is one, at the width of a phone and of a desk, in light and in dark: nothing on them may be cut off.

The published site is built by Quarto (`nbdev-docs`). Quarto is no Python package: what `pip install quarto-cli` gets
downloads the program from GitHub, so that a machine which only reaches a package index has none. These pages are not
byte for byte those of Quarto, but they have its layout, its widths and the same MathML in place of formulas.
"""
import base64, contextlib, functools, html, http.server, json, os, re, shutil
import subprocess, sys, tempfile, threading, urllib.parse
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT/'_docs'
WIDTHS = (390, 1280)
# Settings that only Quarto reads
OF_QUARTO = re.compile('format-links|format commonmark is not built|output-file is not read|code-block|highlight-style|'
                       'code-overflow|format.html.(grid|keep-md|html-math-method)')

# --- build

def process():
    "Run nbdev's own processing of the notebooks, afresh, and return its folder"
    shutil.rmtree(ROOT/'_proc', ignore_errors=True)
    code = ('from nbdev.quarto import refresh_quarto_yml; from nbdev.serve import proc_nbs; '
            'refresh_quarto_yml(); proc_nbs(n_workers=0, force=True)')
    kwargs = dict(cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'MPLBACKEND': 'agg'})
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], **kwargs)
    if p.returncode: raise RuntimeError(f'nbdev cannot process the notebooks:\n{p.stderr[-2000:]}')
    return ROOT/'_proc'

def final_names(proc):
    "Map each processed notebook to the name that its page has, which nbdev writes into its front matter"
    names = {}
    for p in sorted(proc.rglob('*.ipynb')):
        cells = json.loads(p.read_text(encoding='utf-8'))['cells']
        m = re.search(r'(?m)^output-file: *(\S+)\.html', ''.join(cells[0]['source'])) if cells else None
        rel = p.relative_to(proc).as_posix()
        names[rel] = (Path(rel).parent/f'{m[1]}.ipynb').as_posix() if m else rel
    return names

def stage(proc, to):
    "Copy the processed notebooks to their final names, in files and in links"
    shutil.copytree(proc, to)
    names = {k: v for k,v in final_names(proc).items() if k != v}
    for old,new in names.items(): (to/old).rename(to/new)
    pat = re.compile('|'.join(rf'(?<![\w/]){re.escape(o)}' for o in names) or '$^')
    for p in [*to.rglob('*.ipynb'), to/'sidebar.yml', to/'_quarto.yml']:
        text,folder = p.read_text(encoding='utf-8'),p.parent.relative_to(to)
        if p.suffix == '.yml': text = pat.sub(lambda m: names[m[0]], text)
        else: text = re.sub(r'\]\(([^):\s]+\.ipynb)', lambda m: f']({final_link(m[1], folder, names)}', text)
        p.write_text(text, encoding='utf-8')

def final_link(link, folder, names):
    "A link from a notebook in `folder` to another one, by the name that its page has"
    to = os.path.normpath(folder/link).replace(os.sep, '/')
    return os.path.relpath(names[to], folder).replace(os.sep, '/') if to in names else link

FORMULA = re.compile(r'(?s)<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>')
KATEX = re.compile(r'<(?:link|script)[^>]*katex[^>]*>(?:</script>)?')

def formulas(page):
    "The text of a page with MathML in place of TeX, as Quarto has it: a page needs no script and no network for it"
    from latex2mathml.converter import convert
    mathml = lambda m: convert(html.unescape(m[2]), display='block' if m[1] == 'display' else 'inline')
    return KATEX.sub('', FORMULA.sub(mathml, page))

def build(out=SITE):
    "Render the site into `out`, and return what smalldocs had to say"
    from smalldocs.site import build as render
    proc = process()
    with tempfile.TemporaryDirectory() as tmp:
        stage(proc, Path(tmp)/'site')
        site = render(Path(tmp)/'site', quiet=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(site.out, out)
    for p in Path(out).rglob('*.html'): p.write_text(formulas(p.read_text(encoding='utf-8')), encoding='utf-8')
    return [str(w) for w in site.warnings if not OF_QUARTO.search(str(w))]

# --- read

class Page(HTMLParser):
    "What a page holds: anchors, links, pictures, title, headings, results, and names that were linked twice"
    def __init__(self, path):
        super().__init__()
        self.ids,self.links,self.images,self.title,self.headings,self.results,self._in = set(),[],[],'',0,0,None
        text = path.read_text(encoding='utf-8')
        self.nested = re.findall(r'<code>([^<]*)</code></a>\]\(', text)
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.add(a['id'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag in ('link','script') and (a.get('href') or a.get('src')): self.links.append(a.get('href') or a['src'])
        if tag == 'img': self.images.append((a.get('src',''), a.get('alt')))
        if tag == 'h1': self.headings += 1
        if re.search(r'\bcell-output', a.get('class') or ''): self.results += 1
        if tag == 'title' and not self.title: self._in = tag
    def handle_endtag(self, tag): self._in = None
    def handle_data(self, data):
        if self._in == 'title': self.title += data

def pages(site=SITE): return {p.relative_to(site).as_posix(): Page(p) for p in sorted(Path(site).rglob('*.html'))}

def problems(site=SITE, base=None):
    "What a reader of the built pages would stumble over"
    site,every = Path(site),pages(site)
    base = base or f"{_setting('doc_url')}"
    for name,page in every.items():
        if name == '404.html': continue
        title = page.title.strip()
        if not title or page.headings != 1:
            yield f'{name}: a page has one title, not {page.headings} (<title>{title}</title>)'
        if not page.results: yield f'{name}: shows no result'
        for o in page.nested: yield f'{name}: write `{o}` without a link, because nbdev makes one'
        for src,alt in page.images:
            if not alt: yield f'{name}: {src[:60]} has no alternative text'
        for link in [*page.links, *(s for s,_ in page.images)]:
            if not leads(link, name, every, site, base): yield f'{name}: link to {link[:100]} leads nowhere'

def leads(link, name, every, site, base):
    "Whether a link leads to a file and an anchor that are there; links out of the site are taken as they are"
    if link.startswith(base): link,name = link[len(base):],'index.html'
    if re.match(r'[a-z]+:|//', link): return True
    path,_,anchor = link.partition('#')
    path = urllib.parse.unquote(path.partition('?')[0])
    target = (Path('/')/Path(name).parent/path) if path else Path('/')/name
    rel = os.path.normpath(target).lstrip('/').replace(os.sep, '/')
    if rel in ('','.') or (site/rel).is_dir(): rel = f'{rel}/index.html'.lstrip('./')
    if not (site/rel).is_file(): return False
    return not anchor or not rel.endswith('.html') or urllib.parse.unquote(anchor) in every[rel].ids

def _setting(key):
    text = (ROOT/'settings.ini').read_text(encoding='utf-8')
    return re.search(rf'(?m)^{key} *= *(.*)$', text)[1].strip()

# --- look

def chromium():
    "Where Chromium is, or `None`"
    if os.name != 'posix': return None
    names = 'chromium','chromium-browser','google-chrome','chrome'
    return next(filter(None, map(shutil.which, names)), None)

FLAGS = '''--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe'''.split()
# The size of a page, and what of its code and its tables is cut off. On a phone a table may scroll within its frame.
SIZE = '''new Promise(r => setTimeout(r, 150)).then(() => {
  const main = document.querySelector('main') || document.body, root = document.documentElement
  const hides = o => getComputedStyle(o).overflowX != 'visible' && o.scrollWidth > o.clientWidth + 1
  const framed = o => innerWidth < 768 && o.tagName == 'TABLE' && parseFloat(getComputedStyle(o).borderRightWidth) > 0
  const cut = e => { for (let o = e; o != main; o = o.parentElement) if (hides(o) && !framed(o)) return true }
  const shown = [...main.querySelectorAll('pre,table')].filter(o => o.checkVisibility() && cut(o))
  return [root.scrollWidth, root.scrollHeight, shown.map(o => o.tagName.toLowerCase() + ': ' + o.innerText.trim())]})'''

class Chrome:
    "Chromium, spoken to through two pipes"
    def __init__(self, exe, profile):
        import fcntl
        (r1,w1),(r2,w2) = os.pipe(),os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (r1,w2)]
        command = [exe, *FLAGS, f'--user-data-dir={profile}', 'about:blank']
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        to_pipes = lambda: [os.dup2(fd, to) for fd,to in zip(ends, (3,4))]
        self.proc = subprocess.Popen(command, close_fds=False, preexec_fn=to_pipes, **silent)
        for fd in (r1,w2,*ends): os.close(fd)
        self.w,self.r,self.n,self.events,self.session = os.fdopen(w1,'wb',0),os.fdopen(r2,'rb'),0,[],None

    def call(self, method, **params):
        self.n += 1
        msg = dict(id=self.n, method=method, params=params) | (dict(sessionId=self.session) if self.session else {})
        self.w.write(json.dumps(msg).encode() + b'\0')
        return self.wait(lambda m: m.get('id') == self.n)

    def wait(self, wanted):
        while True:
            got = self._read()
            if 'method' in got: self.events.append(got)
            if wanted(got):
                if 'error' in got: raise RuntimeError(got['error'])
                return got.get('result', got)

    def _read(self):
        buf = bytearray()
        while (c := self.r.read(1)) != b'\0':
            if not c: raise RuntimeError('Chromium has ended')
            buf += c
        return json.loads(buf)

    def open(self):
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self.session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for o in ('Page','Runtime','Log'): self.call(f'{o}.enable')

    def visit(self, url, width, dark=False):
        "Load a page and return what went wrong, how wide and how high it is, and the code and tables that are cut off"
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = dict(name='prefers-color-scheme', value='dark' if dark else 'light')
        self.call('Emulation.setEmulatedMedia', features=[scheme])
        self.events.clear()
        self.call('Page.navigate', url=url)
        self.wait(lambda m: m.get('method') == 'Page.loadEventFired')
        size = self.call('Runtime.evaluate', expression=SIZE, awaitPromise=True, returnByValue=True)
        return [m for m in map(said, self.events) if m and not self.elsewhere(m, url)],*size['result']['value']

    def elsewhere(self, message, url):
        "Whether a message tells that a file of another server, such as a font, could not be loaded"
        return message.startswith('error: Failed to load resource') and '/'.join(url.split('/')[:3]) not in message

    def shot(self, out, width, height):
        clip = dict(x=0, y=0, width=width, height=min(height, 6000), scale=1)
        picture = self.call('Page.captureScreenshot', captureBeyondViewport=True, clip=clip)['data']
        out.write_bytes(base64.b64decode(picture))

    def close(self):
        with contextlib.suppress(Exception): self.session = None; self.call('Browser.close')
        try: self.proc.wait(10)
        except subprocess.TimeoutExpired: self.proc.kill()
        self.w.close(); self.r.close()

def said(event):
    "The text of a message on the console or of an error, or `None`"
    p,method = event.get('params', {}),event['method']
    if method == 'Runtime.exceptionThrown':
        details = p['exceptionDetails']
        return 'error: ' + (details.get('exception') or {}).get('description', details['text'])
    if method == 'Runtime.consoleAPICalled':
        return f"{p['type']}: " + ' '.join(str(a.get('value', a.get('description'))) for a in p['args'])
    if method == 'Log.entryAdded': return f"{p['entry']['level']}: {p['entry']['text']} {p['entry'].get('url','')}"

@contextlib.contextmanager
def served(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_address[1]}'
    finally: server.shutdown(); server.server_close()

def look(site=SITE, shots=None, exe=None, only=None):
    "Open each page in Chromium at each width: what the console says and what does not fit; pictures go to `shots`"
    if shots: Path(shots).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, served(site) as url:
        chrome = Chrome(exe or chromium(), profile)
        try:
            chrome.open()
            for name in only or pages(site):
                for width,dark in [(w,False) for w in WIDTHS] + [(WIDTHS[-1],True)]:
                    messages,wide,high,cut = chrome.visit(f'{url}/{name}', width, dark)
                    for m in messages: yield f'{name}: the console says {m[:200]}'
                    if wide > width: yield f'{name}: is {wide} pixels wide on a screen of {width}'
                    for o in cut: yield f'{name}: is cut off on a screen of {width}: {" ".join(o.split())[:80]}'
                    picture = f"{name[:-5].replace('/','_')}-{width}{'-dark' if dark else ''}.png"
                    if shots: chrome.shot(Path(shots)/picture, width, high)
        finally: chrome.close()

def main(shots=None):
    "Build and check; return the problems"
    try: import latex2mathml, smalldocs
    except ImportError as e:
        print("The site was not built: pip install 'smalldocs==0.5.4' latex2mathml (Python 3.11 or newer); "
              "Quarto and nbdev-docs build what is published")
        return [f'no {e.name}']
    found = build() + list(problems())
    if chromium(): found += list(look(shots=shots))
    else: print('Chromium was not found: the pages were read, but not opened in a browser')
    print(f'{len(pages())} pages in {SITE.name}/')
    return found
