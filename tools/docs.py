"""Run the notebooks and keep their outputs, write README.md from nbs/index.ipynb, and check the documentation.

    python tools/docs.py            # README and checks; fold cells that only test, and remove saved progress bars
    python tools/docs.py --run      # run every notebook first, and save what it shows
    python tools/docs.py --check    # only say what is not as it should be
    python tools/docs.py --site     # build the site too, and check its pages; --shots FOLDER keeps pictures of them
"""
import ast, json, re, sys
from pathlib import Path
import os, sync_settings

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
DATA = 'FASTAI_JOCOR_DATA'     # the folder of data that some tutorials read

def notebooks():
    hidden = lambda p: any(o.startswith(('.','_')) for o in p.relative_to(NBS).parts)
    return sorted(p for p in NBS.rglob('*.ipynb') if not hidden(p))
def cells(p): return json.loads(p.read_text(encoding='utf-8'))['cells']
def source(c): return ''.join(c['source'])

def modules(folder=ROOT/'fastai_jocor'):
    "Names of the modules of a folder, in the order of their notebooks"
    number = re.compile(r'nbs/(?:lab/)?(\d+[a-z]?)_(\w+)\.ipynb')
    found = {p.stem: number.search(p.read_text(encoding='utf-8')) for p in Path(folder).glob('*.py')}
    return sorted((n for n,m in found.items() if m), key=lambda n: found[n].groups())

def needs_data(p):
    "Whether a notebook reads files that this repository does not have"
    return any(DATA in source(c) for c in cells(p))

def run_notebooks():
    "Run each notebook in a process of its own, so that each shows what it shows when it is opened first"
    import subprocess
    for p in notebooks():
        if needs_data(p) and DATA not in os.environ:
            print(f'{p.relative_to(ROOT)} keeps its outputs: set {DATA} to the folder of the data', flush=True)
            continue
        print(p.relative_to(ROOT), flush=True)
        code = ('import sys; from nbdev.test import test_nb; '
                f"sys.exit(not test_nb({str(p)!r}, skip_flags=['slow','cuda'], save=True)[0])")
        subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, cwd=p.parent)
        edit(p, lambda c: source(c).startswith('show_doc('), lambda c: c.update(outputs=[], execution_count=None))
    from nbdev.clean import nbdev_clean
    nbdev_clean(str(NBS))

def readme():
    "The text of README.md"
    from nbformat import reads
    nb = reads((NBS/'index.ipynb').read_text(encoding='utf-8'), as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\| *(hide|export)', c.source)]
    for c in nb.cells:
        if c.cell_type == 'code' and '#| echo: false' in c.source: c.metadata['hide_source'] = True
    parts = []
    for c in nb.cells:
        if c.cell_type == 'markdown': parts.append(c.source)
        else:
            code = re.sub(r'(?m)^#\|.*\n', '', c.source)
            if not c.metadata.get('hide_source'): parts.append(f'```python\n{code}\n```')
            parts += [_output(o) for o in c.outputs]
    parts.insert(1, badges())
    text = '\n\n'.join(p.strip('\n') for p in parts if p.strip()) + '\n'
    return re.sub(r'\]\((images/[^)]+|[\w/]+\.ipynb[^)]*)\)', lambda m: f']({absolute(m[1])})', text)

def page_of(nb):
    "The page that a notebook becomes, such as `callback.html` of `08_callback.ipynb`"
    folder,_,name = nb.rpartition('/')
    return f"{folder}/{re.sub(r'^[0-9]+[a-z]*_', '', name)}".lstrip('/').replace('.ipynb', '.html')

def absolute(link):
    "A link of the home page as it works anywhere, such as on a package index"
    s = sync_settings.read_settings()
    if not link.startswith('images/'): return s['doc_url'] + page_of(link)
    raw = s['git_url'].replace('//github.com', '//raw.githubusercontent.com')
    return f"{raw}/{s['branch']}/nbs/{link}"

def badges():
    s = sync_settings.read_settings()
    shield = 'https://img.shields.io/badge/'
    of_tests = f"{s['git_url']}/actions/workflows/test.yml"
    shown = [('tests', f'{of_tests}/badge.svg', of_tests),
             ('documentation', f'{shield}docs-site-blue', s['doc_url']),
             (f"Python {s['min_python']} or newer", f"{shield}python-{s['min_python']}%2B-blue", s['git_url']),
             (s['license'], f"{shield}license-{s['license'].replace('-', '--')}-blue",
              f"{s['git_url']}/blob/{s['branch']}/LICENSE")]
    return '\n'.join(f'[![{name}]({picture})]({to})' for name,picture,to in shown)

def _output(o):
    if o.output_type == 'stream': return '```\n' + ''.join(o.text).rstrip() + '\n```'
    data = o.get('data', {})
    return ''.join(data.get('text/markdown', '')) or ('```\n' + ''.join(data.get('text/plain', '')) + '\n```')

def only_tests(c):
    "Whether a cell tests and shows nothing, and is neither hidden nor folded"
    if c['cell_type'] != 'code' or c.get('outputs'): return False
    if re.search(r'#\| *(hide|export|code-fold)', source(c)): return False
    nodes = ast.walk(ast.parse(re.sub(r'(?m)^\s*[%!].*', '', source(c))))
    called = lambda o: isinstance(o, ast.Call) and getattr(o.func, 'id', '').startswith('test_')
    return any(isinstance(o, ast.Assert) or called(o) for o in nodes)

def edit(p, which, change):
    "Change some cells of a notebook"
    nb = json.loads(p.read_text(encoding='utf-8'))
    found = [c for c in nb['cells'] if which(c)]
    for c in found: change(c)
    text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'
    if found: p.write_text(text, encoding='utf-8', newline='\n')

BAR = re.compile(r'[^\n]*\r|[^\n|]*\|[█-]{20,}\| [\d.]+% \[[^\]]*\]')
def streams(c): return [o for o in c.get('outputs', []) if o['output_type'] == 'stream']
def has_bar(c): return any(BAR.search(''.join(o['text'])) for o in streams(c))

def remove_bar(c):
    "Remove saved progress bars from what a cell shows"
    for o in streams(c): o['text'] = BAR.sub('', ''.join(o['text'])).splitlines(True)
    c['outputs'] = [o for o in c['outputs'] if o.get('text') != []]

def tidy(p):
    "Remove saved progress bars, and fold the cells that only test: they are run, and a click away for a reader"
    edit(p, has_bar, remove_bar)
    edit(p, only_tests, lambda c: c.update(source=['#| code-fold: true\n', *source(c).splitlines(True)]))

def problems():
    "What a reader would stumble over"
    for p in notebooks():
        name,cs = p.relative_to(ROOT).as_posix(),cells(p)
        first = source(cs[0])
        if not re.match(r'# .+\n+> .+', first):
            yield f'{name}: the first cell must be a title and a line under it that starts with >'
        if re.match(r'# [a-z][a-z ]*\n', first): yield f'{name}: the title must begin with a capital, or be a name'
        code = [c for c in cs if c['cell_type'] == 'code' and not re.search(r'#\| *(hide|default_exp)', source(c))]
        if not any(c.get('outputs') for c in code): yield f'{name}: no saved output at all'
        if any(map(has_bar, cs)): yield f'{name}: a saved progress bar (run python3 dev.py docs)'
        for c in filter(only_tests, cs):
            yield f'{name}: fold the cell that only tests (run python3 dev.py docs): {source(c)[:60]!r}'
        for c in cs:
            for o in c.get('outputs', []):
                if o['output_type'] == 'error': yield f"{name}: a saved error: {o['ename']}"
            if c['cell_type'] != 'markdown': continue
            for link in re.findall(r'\]\(([^)#\s]+)[^)]*\)', source(c)):
                outside = re.match(r'https?:|mailto:', link)
                if not outside and not (p.parent/link).exists(): yield f'{name}: link to {link} leads nowhere'
            for rest in re.findall(r'\]\([^)]*\)(\.ipynb\S*)', source(c)):
                yield f'{name}: {rest!r} is left over after a link'
            for alt in re.findall(r'!\[([^\]]*)\]', source(c)):
                if not alt: yield f'{name}: a picture without alternative text'
    listed = set(re.findall(r'- (\S+\.ipynb)', (NBS/'sidebar.yml').read_text(encoding='utf-8')))
    for p in notebooks():
        name = p.relative_to(NBS).as_posix()
        if name not in listed: yield f'nbs/sidebar.yml: {name} is missing'

def main(*args):
    import front
    if not front.is_drawn() and '--check' not in args: front.draw()
    if '--run' in args: run_notebooks()
    if '--check' not in args:
        for p in notebooks(): tidy(p)
    found,text = list(problems()),readme()
    if not front.is_drawn():
        found.append('nbs/images/everyday.png does not show the runs that are there: run python3 dev.py docs')
    if '--check' in args:
        if (ROOT/'README.md').read_text(encoding='utf-8') != text:
            found.append('README.md is not what nbs/index.ipynb gives: run python3 dev.py docs')
    else: (ROOT/'README.md').write_text(text, encoding='utf-8', newline='\n')
    if '--site' in args:
        import website
        found += website.main(args[args.index('--shots')+1] if '--shots' in args else None)
    for o in found: print(o)
    print(f'{len(notebooks())} notebooks, {len(found)} problems')
    return int(bool(found))

if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
