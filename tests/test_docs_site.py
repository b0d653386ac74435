"The site, the pages on architecture and citation, the workflows and the template agree with the code."
import ast, importlib.util, json, re, shutil, subprocess, sys, pytest, yaml
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
sys.path.insert(0, str(ROOT/'tools'))
import docs, sync_settings, website

# --- the site

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    if importlib.util.find_spec('smalldocs') is None: pytest.skip('needs smalldocs')
    out = tmp_path_factory.mktemp('built')/'site'
    assert website.build(out) == []
    return out

def test_pages_of_the_site(site):
    assert list(website.problems(site)) == []
    names = {Path(website.final_names(ROOT/'_proc')[p.relative_to(NBS).as_posix()]).with_suffix('.html').as_posix() for p in docs.notebooks()}
    assert names <= set(website.pages(site)) and any(n.startswith('tutorials/') for n in names)

def test_links_lead_from_a_folder_to_pages_that_have_another_name(site):
    names = {'05_callback.ipynb': 'callback.ipynb', 'tutorials/01_a.ipynb': 'tutorials/a.ipynb'}
    for folder,link,final in (('.','05_callback.ipynb','callback.ipynb'), ('tutorials','../05_callback.ipynb','../callback.ipynb'), ('tutorials','01_a.ipynb','a.ipynb'),
                              ('.','tutorials/01_a.ipynb','tutorials/a.ipynb'), ('tutorials','../speed.ipynb','../speed.ipynb'), ('tutorials','05_callback.ipynb','05_callback.ipynb')):
        assert website.final_link(link, Path(folder), names) == final
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
    assert list(website.look(site, tmp_path, only=['index.html','noise.html'])) == []
    assert {p.name for p in tmp_path.iterdir()} == {f'{n}-{w}.png' for n in ('index','noise') for w in ('390','1280','1280-dark')}

PAGE = '<html><head><title>{title}</title></head><body><h1>One</h1><div class="cell-output">1</div>{body}</body></html>'
@pytest.mark.parametrize('body,says', [('<a href="nowhere.html">a</a>', 'nowhere.html leads nowhere'), ('<a href="#x">a</a>', '#x leads nowhere'), ('<a href="https://e.org/s/b.html#x">a</a>', 'b.html#x leads nowhere'),
    ('<img src="p.png" alt="">', 'no alternative text'), ('<h1>Two</h1>', 'one title'), ('<a href="#y">a</a><p id="y">', None), ('<a href="https://e.org/t">a</a>', None)])
def test_what_is_wrong_on_a_page_is_found(body, says, tmp_path):
    (tmp_path/'p.png').write_bytes(b'')
    (tmp_path/'a.html').write_text(PAGE.format(title='t', body=body))
    found = list(website.problems(tmp_path, 'https://e.org/s/'))
    assert found == [] if says is None else len(found) == 1 and says in found[0]

def test_browser_finds_errors_and_wide_pages(tmp_path):
    if website.chromium() is None: pytest.skip('needs Chromium')
    (tmp_path/'a.html').write_text(PAGE.format(title='t', body='<div style="width:700px">wide</div><script>console.warn("hm"); nothing()</script>'))
    found = set(website.look(tmp_path))
    assert any('nothing is not defined' in o for o in found) and any('hm' in o for o in found) and any(re.match(r'a.html: is 7\d\d pixels wide on a screen of 390', o) for o in found)

# --- configuration

def test_configuration_is_linked_and_names_files_that_exist():
    conf = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    assert (NBS/'_quarto.yml').resolve() == ROOT/'_quarto.yml' and conf['metadata-files'] == ['nbdev.yml','sidebar.yml']
    web = conf['website']
    for f in (web['favicon'], web['image'], web['navbar']['logo'], conf['format']['html']['css'], *(o['href'] for o in web['navbar']['left'])): assert (NBS/f).is_file(), f
    assert set(conf['format']['html']['theme']) == {'light','dark'} and web['search']

def test_card_is_drawn_from_the_logo(tmp_path):
    import card
    from PIL import Image
    card.draw(tmp_path/'card.png')
    with Image.open(tmp_path/'card.png') as new, Image.open(NBS/'images'/'card.png') as kept: assert new.size == kept.size == card.SIZE
    assert len(list(card.circles())) == 4

# --- architecture

def imports():
    "Modules in the order of their notebooks, and what each imports from, by reading the import lines"
    res = {}
    for folder,prefix in ((ROOT/'fastai_jocor',''), (ROOT/'fastai_jocor'/'lab','lab.')):
        for name in docs.modules(folder):
            found = re.findall(r'(?m)^from (\.+)(\w+)(?:\.(\w+))? import', (folder/f'{name}.py').read_text(encoding='utf-8'))
            res[prefix+name] = {f'lab.{sub}' if mod == 'lab' else mod if prefix == '' or dots == '..' else f'lab.{mod}' for dots,mod,sub in found}
    return res

def test_architecture_page_is_the_code():
    nb = json.loads((NBS/'architecture.ipynb').read_text(encoding='utf-8'))
    table = next(t for c in nb['cells'] if c['cell_type'] == 'code' for o in c['outputs'] if '| module |' in (t := ''.join(o.get('data', {}).get('text/markdown', ''))))
    rows = re.findall(r'(?m)^\| \[([\w.]+)\]\(([\w/]+)\.ipynb\) \|.*\| ([\w., –]+) \|$', table)
    shown = {m: set() if uses == '–' else set(uses.split(', ')) for m,_,uses in rows}
    assert shown == imports(), 'run nbs/architecture.ipynb anew and keep what it shows'
    assert any('image/png' in o.get('data', {}) for c in nb['cells'] for o in c.get('outputs', []))

def shows(c): return ''.join(''.join(o.get('text', '')) + ''.join(o.get('data', {}).get('text/markdown', '')) + ''.join(o.get('data', {}).get('text/plain', '')) for o in c['outputs'])

def test_pages_show_the_results_that_are_there():
    from fastai_jocor.lab.report import read_results
    results,say = ROOT/'benchmarks'/'results',': run nbs/{} anew and keep what it shows'
    df = read_results(results/'mnist_protocol')
    some = df[(df.noise == 'symmetric:0.5') & df.label.isin(['standard','jocor k=2','jocor k=3'])]
    text = next(shows(c) for c in docs.cells(NBS/'index.ipynb') if '#| echo: false' in docs.source(c))
    for _,rs in some.groupby('label'): assert f"{100*rs.ensemble_accuracy.mean():.1f}%" in text and re.search(rf'\({rs.seed.nunique()} seeds?\)', text), say.format('index.ipynb')
    text = next(shows(c) for c in docs.cells(NBS/'tutorials'/'three_or_two.ipynb') if 'read_results(' in docs.source(c))
    for name,n in (('digits',len(read_results(results/'digits_grid'))), ('MNIST',len(df))): assert re.search(rf'(?m)^{name} +{n} ', text), say.format('tutorials/three_or_two.ipynb')
    grid,every = results/'mnist_lambda_tau',lambda nb: ''.join(shows(c) for c in docs.cells(NBS/nb) if c['cell_type'] == 'code')
    assert (f'{len(read_results(grid))} runs on MNIST' if any(grid.glob('*/result.json')) else 'is not among the results yet') in every('tutorials/choosing.ipynb'), say.format('tutorials/choosing.ipynb')
    assert f'Of the {len(df)} runs in that folder' in every('design.ipynb'), say.format('design.ipynb')

def test_pages_that_others_start_from():
    nb = json.loads((ROOT/'tools'/'template.ipynb').read_text(encoding='utf-8'))
    assert not any(c.get('outputs') for c in nb['cells']) and ROOT/'tools'/'template.ipynb' not in docs.notebooks()
    space = {}
    import matplotlib; matplotlib.use('agg')
    for c in nb['cells']:
        if c['cell_type'] == 'code': exec(''.join(c['source']), space)
    assert space['scaled'].__doc__

# --- workflows, citation, verbs

FLOWS = {p.stem: yaml.safe_load(p.read_text(encoding='utf-8')) for p in sorted((ROOT/'.github'/'workflows').glob('*.yml'))}

def test_workflows():
    assert set(FLOWS) == {'docs','release','test'}
    for name,flow in FLOWS.items():
        assert flow['permissions'] == {'contents': 'read'} and (True in flow or 'on' in flow)          # YAML reads the key `on` as true
        for job in flow['jobs'].values():
            assert job['runs-on'] and job['timeout-minutes'] and job['steps']
            for need in [job.get('needs', [])] if isinstance(job.get('needs', []), str) else job.get('needs', []): assert need in flow['jobs']
            for step in job['steps']: assert ('uses' in step) != ('run' in step) and ('uses' not in step or re.fullmatch(r'[\w-]+/[\w/-]+@[\w./-]+', step['uses']))
    matrix = FLOWS['test']['jobs']['test']['strategy']['matrix']
    assert matrix['python'] == ['3.10','3.11','3.12','3.13'] and {o.split('-')[0] for o in matrix['os']} == {'ubuntu','macos','windows'}
    assert matrix['python'][0] == sync_settings.read_settings()['min_python']
    assert FLOWS['release']['jobs']['publish']['permissions'] == {'id-token': 'write'} and FLOWS['release'][True] == {'push': {'tags': ['v*']}}
    assert any(s.get('run') == 'nbdev-docs' for s in FLOWS['docs']['jobs']['build']['steps'])

def test_citation():
    cff,s = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8')),sync_settings.read_settings()
    assert {'cff-version','message','title','authors','version','license','references'} <= set(cff)
    assert cff['version'] == s['version'] and cff['license'] == s['license'] and cff['title'] == s['lib_name'] and cff['repository-code'] == s['git_url'] and cff['url'] == s['doc_url']
    refs = {r['authors'][0]['family-names']: r for r in cff['references']}
    assert all({'type','title','authors','year'} <= set(r) for r in cff['references'])
    assert refs['Wei']['url'].endswith('2003.02752') and refs['Han']['url'].endswith('1804.06872') and refs['Fazekas']['year'] == 2023 and 'url' not in refs['Fazekas']

def test_help_lists_every_verb_and_kaggle_prints_its_commands():
    said = lambda *a: subprocess.run([sys.executable, ROOT/'dev.py', *a], capture_output=True, text=True, check=True).stdout
    verbs = re.search(r'verbs = dict\((.*)\)', (ROOT/'dev.py').read_text(encoding='utf-8'))[1]
    for verb in re.findall(r'(\w+)=', verbs): assert re.search(rf'(?m)^  {verb} ', said('help')), verb
    assert re.findall(r'(?m)^kaggle kernels push -p (.*)$', said('kaggle')) == [p.parent.relative_to(ROOT).as_posix() for p in sorted((ROOT/'kaggle').glob('*/kernel-metadata.json'))]
