"The site, the pages on architecture and citation, the workflows and the template agree with the code."
import ast, importlib.util, json, re, subprocess, sys, pandas as pd, pytest, yaml
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
sys.path.insert(0, str(ROOT/'tools'))
import docs, sync_settings, website
from fastai_jocor.lab.page import drop_index

# --- the site

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    for name in ('smalldocs','latex2mathml'): pytest.importorskip(name)
    out = tmp_path_factory.mktemp('built')/'site'
    assert website.build(out) == []
    return out

def test_pages_of_the_site(site):
    assert list(website.problems(site)) == []
    named_alike = [o for p in website.pages(site).values() for o in p.links if '//fastcore.fast.ai' in o]
    assert not named_alike, 'nbdev took a name in backticks for a function of fastcore: word it otherwise'
    final = website.final_names(ROOT/'_proc')
    page = lambda p: Path(final[p.relative_to(NBS).as_posix()]).with_suffix('.html').as_posix()
    names = {page(p) for p in docs.notebooks()}
    assert names <= set(website.pages(site)) and any(n.startswith('tutorials/') for n in names)

def test_links_lead_from_a_folder_to_pages_that_have_another_name(site):
    names = {'05_callback.ipynb': 'callback.ipynb', 'tutorials/01_a.ipynb': 'tutorials/a.ipynb'}
    of_top = {'05_callback.ipynb': 'callback.ipynb', 'tutorials/01_a.ipynb': 'tutorials/a.ipynb'}
    of_folder = {'../05_callback.ipynb': '../callback.ipynb', '01_a.ipynb': 'a.ipynb'}
    of_folder |= {o: o for o in ('../speed.ipynb','05_callback.ipynb')}
    for folder,links in (('.',of_top), ('tutorials',of_folder)):
        for link,final in links.items(): assert website.final_link(link, Path(folder), names) == final
    assert '../callback.html' in website.Page(site/'tutorials'/'quickstart.html').links

def test_pages_show_the_interface_and_link_to_its_source(site):
    for module in [*docs.modules(), *(f'lab/{m}' for m in docs.modules(ROOT/'fastai_jocor'/'lab'))]:
        if module == 'all': continue
        text = (site/f'{module}.html').read_text(encoding='utf-8')
        tree = ast.parse((ROOT/'fastai_jocor'/f'{module}.py').read_text(encoding='utf-8'))
        for o in tree.body:
            if not isinstance(o, (ast.FunctionDef,ast.ClassDef)) or o.name.startswith('_') or o.decorator_list: continue
            assert f'id="{o.name.lower()}"' in text, f'{module}.{o.name} is not on the page'
        assert re.search(rf'fastai_jocor/{module}\.py#L\d+', text)

def test_sidebar_is_the_order_of_the_house(site):
    side = re.search(r'(?s)id="quarto-sidebar".*?</nav>', (site/'index.html').read_text(encoding='utf-8'))[0]
    shown = [o.removeprefix('./') for o in re.findall(r'href="([\w./]+)\.html"', side)]
    for order in (docs.modules(), [f'lab/{m}' for m in docs.modules(ROOT/'fastai_jocor'/'lab')]):
        assert [o for o in shown if o in order] == order

def test_browser(site, tmp_path):
    if website.chromium() is None: pytest.skip('needs Chromium')
    names = 'index','audit','compatibility','reference/jocor_callback','tutorials/choosing'
    assert list(website.look(site, tmp_path, only=[f'{n}.html' for n in names])) == []
    sizes = '390','1280','1280-dark'
    assert {p.name for p in tmp_path.iterdir()} == {f"{n.replace('/', '_')}-{w}.png" for n in names for w in sizes}

PAGE = '<html><head><title>{title}</title></head><body><h1>One</h1><div class="cell-output">1</div>{body}</body></html>'
BODIES = [('<a href="nowhere.html">a</a>', 'nowhere.html leads nowhere'), ('<a href="#x">a</a>', '#x leads nowhere'),
    ('<a href="https://e.org/s/b.html#x">a</a>', 'b.html#x leads nowhere'), ('<h1>Two</h1>', 'one title'),
    ('<img src="p.png" alt="">', 'no alternative text'), ('<a href="#y">a</a><p id="y">', None),
    ('<a href="https://e.org/t">a</a>', None),
    ('<p>[<a href="a.html"><code>Peers</code></a>](a.html)</p>', 'write `Peers` without a link')]

@pytest.mark.parametrize('body,says', BODIES)
def test_what_is_wrong_on_a_page_is_found(body, says, tmp_path):
    (tmp_path/'p.png').write_bytes(b'')
    (tmp_path/'a.html').write_text(PAGE.format(title='t', body=body))
    found = list(website.problems(tmp_path, 'https://e.org/s/'))
    assert found == [] if says is None else len(found) == 1 and says in found[0]

def test_browser_finds_errors_and_wide_pages(tmp_path):
    if website.chromium() is None: pytest.skip('needs Chromium')
    body = '<div style="width:700px">wide</div><script>console.warn("hm"); nothing()</script>'
    (tmp_path/'a.html').write_text(PAGE.format(title='t', body=body))
    found = set(website.look(tmp_path))
    for said in ('nothing is not defined', 'hm', r'^a.html: is 7\d\d pixels wide on a screen of 390'):
        assert any(re.search(said, o) for o in found), said

WIDE = """<main><pre style="overflow-x:auto">{0}</pre><table style="display:block;overflow-x:auto"><td>{0}</table>
<table style="display:block;overflow-x:auto;border:1px solid"><td>framed{1}</table><pre>short</pre>
<details><pre style="overflow-x:auto">{0} folded</pre></details></main>"""

def test_browser_finds_what_is_cut_off(tmp_path):
    if website.chromium() is None: pytest.skip('needs Chromium')
    body = WIDE.format('long'*60, 'long'*20)
    (tmp_path/'a.html').write_text(PAGE.format(title='t', body=body))
    found = '\n'.join(website.look(tmp_path))
    cut = re.findall(r'(?m)^a.html: is cut off on a screen of (\d+): (\w+): long', found)
    assert cut == [(w, tag) for w in ('390','1280','1280') for tag in ('pre','table')]
    assert found.count('cut off') == len(cut)

def test_formulas_need_no_network(site):
    text = (site/'losses.html').read_text(encoding='utf-8')
    assert text.count('<math') > 8 and '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in text
    for p in site.rglob('*.html'):
        assert not re.search(r'katex|class="math|https?://cdn', p.read_text(encoding='utf-8')), p
    conf = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    assert conf['format']['html']['html-math-method'] == 'mathml'

def without_index(df):
    cell = dict(outputs=[dict(data={'text/html': df._repr_html_().splitlines(True)}), dict(text='a')])
    drop_index(cell)
    return ''.join(cell['outputs'][0]['data']['text/html'])

def test_an_index_that_only_numbers_rows_is_not_shown(site):
    df = pd.DataFrame(dict(a=['0','1','x'], b=[1,2,3]))
    assert without_index(df) != df._repr_html_() and '<tr>\n      <td>x</td>\n      <td>3</td>' in without_index(df)
    two_rows = pd.concat({'a': df}, axis=1)
    for o in (df[1:], df.rename_axis('position'), df.set_index('a'), two_rows, df.set_index(['b','a'])):
        assert without_index(o) == o._repr_html_()
    notebook,page = (p.read_text(encoding='utf-8') for p in (NBS/'10_noise.ipynb', site/'noise.html'))
    assert '<th>0</th>' in notebook and '<th>0</th>' not in page and 'class="dataframe"' in page

# --- tests in the notebooks

def test_cells_that_only_test_are_folded(tmp_path):
    tests = ['x = 1\ntest_eq(x, 1)', 'assert True']
    others = ['x = 2', '#| hide\nassert True', '%time\nx = 3', 'test_eq(3, 3)']
    sources = tests+others
    cells = [dict(cell_type='code', source=o.splitlines(True), outputs=[]) for o in sources]
    cells[-1]['outputs'] = [dict(output_type='stream', text='shown')]
    (tmp_path/'a.ipynb').write_text(json.dumps(dict(cells=cells)))
    assert [docs.only_tests(c) for c in cells] == [True,True,False,False,False,False]
    docs.tidy(tmp_path/'a.ipynb')
    folded = docs.cells(tmp_path/'a.ipynb')
    is_folded = [docs.source(c).startswith('#| code-fold: true\n') for c in folded]
    assert is_folded == [True,True,False,False,False,False]
    assert docs.source(folded[0]).endswith(sources[0]) and not any(map(docs.only_tests, folded))

def test_saved_progress_bars_are_removed():
    bars = ['█\r','\r',' |----------------------------------------| 0.00% [0/3 00:00<?]\r',
            ' |██████████████████████████--------------| 66.67% [2/3 00:00<00:00]']
    shown = lambda *text: dict(output_type='stream', text=list(text))
    c = dict(outputs=[shown(*bars), shown(*bars, '\r', 'a | b\n', '3%\n'), dict(output_type='execute_result')])
    assert docs.has_bar(c)
    docs.remove_bar(c)
    assert c['outputs'] == [shown('a | b\n', '3%\n'), dict(output_type='execute_result')] and not docs.has_bar(c)

# --- configuration

def test_configuration_is_linked_and_names_files_that_exist():
    conf = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    assert (NBS/'_quarto.yml').resolve() == ROOT/'_quarto.yml' and conf['metadata-files'] == ['nbdev.yml','sidebar.yml']
    web = conf['website']
    pages = [o['href'] for o in web['navbar']['left']]
    for f in (web['favicon'], web['image'], web['navbar']['logo'], conf['format']['html']['css'], *pages):
        assert (NBS/f).is_file(), f
    assert set(conf['format']['html']['theme']) == {'light','dark'} and web['search']

def test_card_is_drawn_from_the_logo(tmp_path):
    import card
    from PIL import Image
    card.draw(tmp_path/'card.png')
    with Image.open(tmp_path/'card.png') as new, Image.open(NBS/'images'/'card.png') as kept:
        assert new.size == kept.size == card.SIZE
    assert len(list(card.circles())) == 4

# --- architecture

def imports():
    "What each module imports from"
    from test_style import CORE, imported, order_of_modules
    return {name: set(imported(CORE/f"{name.replace('.', '/')}.py")) for name in order_of_modules()}

def test_architecture_page_is_the_code():
    outputs = [o.get('data', {}) for c in docs.cells(NBS/'architecture.ipynb') for o in c.get('outputs', [])]
    markdown = [''.join(o.get('text/markdown', '')) for o in outputs]
    table = '\n'.join(o for o in markdown if '| module |' in o)
    rows = re.findall(r'(?m)^\| \[([\w.]+)\]\(([\w/]+)\.ipynb\) \|.*\| ([\w., –]+) \|$', table)
    shown = {m: set() if uses == '–' else set(uses.split(', ')) for m,_,uses in rows}
    assert shown == imports(), 'run nbs/architecture.ipynb anew and keep what it shows'
    assert any('image/png' in o for o in outputs)

def shows(c):
    "The text that a cell shows"
    data = lambda o, kind: ''.join(o.get('data', {}).get(kind, ''))
    return ''.join(''.join(o.get('text', '')) + data(o, 'text/markdown') + data(o, 'text/plain') for o in c['outputs'])

RESULTS = ROOT/'benchmarks'/'results'

def shown(notebook, holds=''):
    "The text that those cells of a notebook show whose source holds something"
    cells = [c for c in docs.cells(NBS/notebook) if c['cell_type'] == 'code' and holds in docs.source(c)]
    return ''.join(map(shows, cells))

def assert_shown(pattern, notebook, holds=''):
    assert re.search(pattern, shown(notebook, holds)), f'run nbs/{notebook} anew and keep what it shows: {pattern}'

def test_pages_show_the_results_that_are_there():
    from fastai_jocor.lab.tables import read_results
    df = read_results(RESULTS/'mnist_protocol')
    import front
    assert_shown(f'means of {front.seeds_of(front.accuracies())} seeds', 'index.ipynb')
    assert_shown(f'Six of the {len(pd.read_csv(front.SUSPECTS))} suspects', 'index.ipynb')
    digits = len(read_results(RESULTS/'digits_grid'))
    for name,n in (('digits',digits), ('MNIST',len(df))):
        assert_shown(rf'(?m)^{name} +{n} ', 'tutorials/three_or_two.ipynb', 'read_results(')
    rows = pd.read_csv(RESULTS/'seeds.csv').query("data == 'features10k' and seed < 100").shape[0]
    assert_shown(f'{rows:,} runs', 'tutorials/three_or_two.ipynb')
    grid = RESULTS/'mnist_lambda_tau'
    assert_shown(f'{len(read_results(grid))} runs on MNIST', 'tutorials/choosing.ipynb')

def test_pages_that_others_start_from():
    nb = json.loads((ROOT/'tools'/'template.ipynb').read_text(encoding='utf-8'))
    assert not any(c.get('outputs') for c in nb['cells']) and ROOT/'tools'/'template.ipynb' not in docs.notebooks()
    space = {}
    import matplotlib; matplotlib.use('agg')
    for c in nb['cells']:
        if c['cell_type'] == 'code': exec(''.join(c['source']), space)
    assert space['scaled'].__doc__

# --- workflows, citation, verbs

WORKFLOWS = sorted((ROOT/'.github'/'workflows').glob('*.yml'))
FLOWS = {p.stem: yaml.safe_load(p.read_text(encoding='utf-8')) for p in WORKFLOWS}

def test_workflows():
    assert set(FLOWS) == {'docs','release','test'}
    for name,flow in FLOWS.items():
        assert flow['permissions'] == {'contents': 'read'}
        assert True in flow or 'on' in flow    # YAML reads the key `on` as true
        for job in flow['jobs'].values():
            assert job['runs-on'] and job['timeout-minutes'] and job['steps']
            needs = job.get('needs', [])
            assert set([needs] if isinstance(needs, str) else needs) <= set(flow['jobs'])
            for step in job['steps']:
                assert ('uses' in step) != ('run' in step)
                if 'uses' in step: assert re.fullmatch(r'[\w-]+/[\w/-]+@[\w./-]+', step['uses'])
    matrix = FLOWS['test']['jobs']['test']['strategy']['matrix']
    assert matrix['python'] == ['3.10','3.11','3.12','3.13']
    assert {o.split('-')[0] for o in matrix['os']} == {'ubuntu','macos','windows'}
    assert matrix['python'][0] == sync_settings.read_settings()['min_python']
    release = FLOWS['release']
    assert release['jobs']['publish']['permissions'] == {'id-token': 'write'}
    assert release[True] == {'push': {'tags': ['v*']}}
    assert any(s.get('run') == 'nbdev-docs' for s in FLOWS['docs']['jobs']['build']['steps'])

def test_citation():
    cff,s = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8')),sync_settings.read_settings()
    assert {'cff-version','message','title','authors','version','license','references'} <= set(cff)
    alike = dict(version='version', license='license', title='lib_name')
    for ours,theirs in alike.items(): assert cff[ours] == s[theirs]
    refs = {r['authors'][0]['family-names']: r for r in cff['references']}
    assert all({'type','title','authors','year'} <= set(r) for r in cff['references'])
    assert refs['Wei']['url'].endswith('2003.02752') and refs['Han']['url'].endswith('1804.06872')
    assert refs['Fazekas']['year'] == 2023 and 'url' not in refs['Fazekas']

def said(*args):
    "What dev.py prints"
    return subprocess.run([sys.executable, ROOT/'dev.py', *args], capture_output=True, text=True, check=True).stdout

def test_help_lists_every_verb():
    verbs = re.search(r'verbs = .* for f in \((.*)\)', (ROOT/'dev.py').read_text(encoding='utf-8'))[1].split(', ')
    assert {'demo','test','prepare','release'} <= set(verbs)
    for verb in verbs: assert re.search(rf'(?m)^  {verb} ', said('help')), verb
