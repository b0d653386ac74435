"The project agrees with itself: settings, exports, notebooks, documentation."
import importlib.metadata, importlib.util, os, re, shutil, subprocess, sys, pandas as pd, pytest
from pathlib import Path
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import docs, front, small_data, sync_settings

NOTEBOOKS = docs.notebooks()

def python(code, **kwargs):
    "Run code in a process of its own"
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, capture_output=True, **kwargs)

@pytest.fixture(scope='session')
def small(tmp_path_factory): return small_data.make(tmp_path_factory.mktemp('small'))

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.relative_to(docs.NBS).with_suffix('').as_posix())
def test_notebook(nb, monkeypatch, request):
    from nbdev.test import test_nb as run_nb
    if docs.needs_data(nb): monkeypatch.setenv(docs.DATA, str(request.getfixturevalue('small')))
    monkeypatch.chdir(nb.parent)
    assert run_nb(nb, skip_flags=['slow','cuda'])[0]

def test_settings_are_the_source_of_truth():
    from nbdev.config import get_config
    assert sync_settings.main(check=True) == 0
    s,cfg,meta = sync_settings.read_settings(),get_config(ROOT),importlib.metadata.metadata('fastai_jocor')
    import fastai_jocor
    assert s['version'] == fastai_jocor.__version__ == cfg.version == meta['Version']
    assert s['lib_name'] == cfg.lib_name == meta['Name']
    assert s['nbs_path'] == Path(cfg.nbs_path).name and s['tst_flags'].split() == list(cfg.tst_flags)
    assert meta['Requires-Python'] == f">={s['min_python']}" and meta['License-Expression'] == s['license']
    norm = lambda o: ','.join(sorted(re.split(r',|(?=[<>])', o.replace(' ',''))))
    required = [r for r in meta.get_all('Requires-Dist') if 'extra ==' not in r]
    assert {norm(o) for o in required} == {norm(o) for o in s['requirements'].split()}
    points = importlib.metadata.distribution('fastai_jocor').entry_points
    scripts = {e.name: e.value for e in points if e.group == 'console_scripts'}
    assert scripts == dict(o.strip().split('=') for o in s['console_scripts'].splitlines() if o.strip())

def test_drift_of_settings_is_seen(tmp_path, capsys):
    shutil.copytree(ROOT/'fastai_jocor', tmp_path/'fastai_jocor')
    for f in ('settings.ini','pyproject.toml'): shutil.copy(ROOT/f, tmp_path)
    assert sync_settings.main(check=True, root=tmp_path) == 0
    ini = tmp_path/'settings.ini'
    ini.write_text(re.sub(r'(?m)^version = .*', 'version = 9.9.9', ini.read_text()))
    assert sync_settings.main(check=True, root=tmp_path) == 1
    sync_settings.main(root=tmp_path)
    assert sync_settings.main(check=True, root=tmp_path) == 0
    assert '9.9.9' in (tmp_path/'fastai_jocor'/'__init__.py').read_text()

def test_addresses_come_from_the_settings(tmp_path):
    "One place has them, and they are written wherever a page or a notebook names them"
    page,cell = tmp_path/'nbs'/'page.ipynb',tmp_path/'kaggle'/'a'/'a.ipynb'
    for f in ('settings.ini','CITATION.cff'): shutil.copy(ROOT/f, tmp_path)
    for p in (page,cell,tmp_path/'fastai_jocor'/'__init__.py'): p.parent.mkdir(parents=True)
    page.write_text('[a](https://github.com/nobody/fastai_jocor/blob/main/x) https://nobody.github.io/fastai_jocor/')
    cell.write_text("ADDRESS = ''")
    ini = tmp_path/'settings.ini'
    text = re.sub(r'(?m)^git_url = .*', 'git_url = https://github.com/some/fastai_jocor', ini.read_text())
    text = re.sub(r'(?m)^doc_url = .*', 'doc_url = https://some.org/docs/', text)
    ini.write_text(re.sub(r'(?m)^published = .*', 'published = no', text))
    sync_settings.main(root=tmp_path)
    assert 'https://some.org' not in (tmp_path/'pyproject.toml').read_text() and cell.read_text() == "ADDRESS = ''"
    assert 'repository-code' not in (tmp_path/'CITATION.cff').read_text()
    ini.write_text(re.sub(r'(?m)^published = .*', 'published = yes', text))
    assert sync_settings.main(check=True, root=tmp_path) == 1
    sync_settings.main(root=tmp_path)
    assert page.read_text() == '[a](https://github.com/some/fastai_jocor/blob/main/x) https://some.org/docs/'
    assert cell.read_text() == "ADDRESS = 'git+https://github.com/some/fastai_jocor'"
    toml,cff = (tmp_path/'pyproject.toml').read_text(),(tmp_path/'CITATION.cff').read_text()
    assert 'Repository = "https://github.com/some/fastai_jocor"' in toml and 'url: "https://some.org/docs/"' in cff
    assert sync_settings.main(check=True, root=tmp_path) == 0

@pytest.mark.parametrize('name', [p.relative_to(ROOT).as_posix() for p in sync_settings.pages()])
def test_nothing_is_installed_from_where_nothing_is(name):
    if sync_settings.read_settings().getboolean('published'): return
    text = (ROOT/name).read_text(encoding='utf-8')
    assert not re.search(r'(git\+|git clone )https://github\.com/[\w-]+/fastai_jocor', text), name
    assert not re.search(r'pip install (-U )?fastai_jocor', text), name

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the sources, to export and clean in"
    tmp = tmp_path_factory.mktemp('copy')
    left_out = shutil.ignore_patterns('__pycache__','models','_*.yml')
    for d in ('nbs','fastai_jocor'): shutil.copytree(ROOT/d, tmp/d, ignore=left_out)
    for f in ('pyproject.toml','settings.ini','README.md'): shutil.copy(ROOT/f, tmp)
    return tmp

def test_modules_are_what_the_notebooks_export(copy):
    python('from nbdev.export import nb_export; from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=copy)
    made = lambda root: {p.relative_to(root).as_posix(): p.read_text() for p in (root/'fastai_jocor').rglob('*.py')}
    here,there = made(ROOT),made(copy)
    assert set(here) == set(there)
    for name,text in here.items(): assert text == there[name], name

def test_tutorials_export_nothing():
    inside = [p for p in NOTEBOOKS if p.parent == docs.NBS/'tutorials']
    assert inside
    for p in inside:
        for c in docs.cells(p): assert not re.search(r'(?m)^#\| *(default_exp|export)', docs.source(c)), p.name

def test_notebooks_that_need_data_are_told_from_the_others(capsys, monkeypatch):
    needing = [p for p in NOTEBOOKS if docs.needs_data(p)]
    assert {p.stem for p in needing} == {'photographs','tables','text'}
    monkeypatch.delenv(docs.DATA, raising=False)
    monkeypatch.setattr(docs, 'notebooks', lambda: needing)
    docs.run_notebooks()
    assert capsys.readouterr().out.count('keeps its outputs') == 3

def test_links_of_the_readme_work_anywhere():
    s = sync_settings.read_settings()
    pages = {docs.page_of(p.relative_to(docs.NBS).as_posix()) for p in NOTEBOOKS}
    raw = s['git_url'].replace('//github.com', '//raw.githubusercontent.com') + f"/{s['branch']}/"
    links = re.findall(r'\]\(([^)\s]+)\)', docs.readme())
    assert all(o.startswith('https://') for o in links)
    ours = [o.partition('#')[0].removeprefix(s['doc_url']) for o in links if o.startswith(s['doc_url'])]
    assert 'tutorials/quickstart.html' in ours and set(ours) <= pages | {''}
    pictures = [o.removeprefix(raw) for o in links if o.startswith(raw)]
    assert len(pictures) == 2 and all((ROOT/o).is_file() for o in pictures)
    names = {'08_callback': 'callback', '13b_posterior': 'posterior', 'lab/04d_suspects_page': 'lab/suspects_page'}
    for nb,page in names.items(): assert docs.page_of(f'{nb}.ipynb') == f'{page}.html'

def test_front_of_the_readme():
    "What a newcomer looks for is near the top, and says nothing that cannot be done"
    text = docs.readme()
    first = text[:text.index('## Install')]
    assert 'JoCorCallback(k=3)' in first and 'audit_labels(learn)' in first and first.count('\n[![') == 4
    assert 'pip install fastai_jocor' not in text and 'pip install git+' not in text
    assert text[text.index('## Where to go next'):].count('\n- [') == 4

def test_notebooks_are_clean(copy):
    before = {p: p.read_text(encoding='utf-8') for p in (copy/'nbs').rglob('*.ipynb')}
    python('from nbdev.clean import nbdev_clean; nbdev_clean()', cwd=copy)
    for p,text in before.items(): assert p.read_text(encoding='utf-8') == text, p.name

@pytest.mark.parametrize('module', ('losses','selection'))
def test_pure_torch_modules_do_not_import_fastai(module):
    loaded = "[m for m in sys.modules if m.split('.')[0] in ('fastai','fastcore')]"
    python(f'import sys, fastai_jocor.{module}; assert not {loaded}')

def test_documentation(): assert list(docs.problems()) == []
def test_readme(): assert (ROOT/'README.md').read_text(encoding='utf-8') == docs.readme()

def test_picture_of_the_home_page_shows_the_runs_that_are_there(tmp_path):
    assert front.is_drawn(), 'run python3 dev.py docs'
    found = front.accuracies()
    assert list(found.index) == list(front.CELLS) and found.notna().all(axis=None) and (found.seeds > 1).all()
    runs = pd.read_csv(front.RUNS)
    changed = (runs.data == 'trec') & (runs.method == 'jocor3') & (runs.noise == 'symmetric 30')
    runs.loc[changed,'accuracy'] += .001
    runs.to_csv(tmp_path/'runs.csv', index=False)
    assert not front.is_drawn(tmp_path/'runs.csv') and not front.is_drawn(picture=tmp_path/'none.png')
    front.draw(tmp_path/'runs.csv', tmp_path/'new.png')
    assert front.is_drawn(tmp_path/'runs.csv', tmp_path/'new.png') and not front.is_drawn(picture=tmp_path/'new.png')

def test_photographs_of_the_home_page_are_suspects(tmp_path):
    s = pd.read_csv(front.SUSPECTS)
    shown = [s[s['item'].str.contains(f'/{o}')] for o in front.SHOWN]
    assert [len(o) for o in shown] == [1]*6 and (s.p_wrong >= .5).all() and s.p_wrong.is_monotonic_decreasing
    for rows in shown:
        file = tmp_path/'clothing'/rows['item'].iloc[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (60,80)).save(file)
    front.draw_photographs(tmp_path, picture=tmp_path/'new.jpg')
    with Image.open(tmp_path/'new.jpg') as new, Image.open(front.PHOTOGRAPHS) as kept: assert new.size == kept.size

def test_nothing_private():
    "No path of a machine, no folder outside of the project"
    files = subprocess.run(['git','ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.split()
    outside = '../sha'+'red'
    for f in files:
        if not (ROOT/f).is_file() or f.endswith(('.png','.jpg','.json','.gz')): continue
        text = (ROOT/f).read_text(encoding='utf-8')
        assert outside not in text and '/ro'+'ot/' not in text and '/wo'+'rk/' not in text, f

def test_dev_help():
    out = subprocess.run([sys.executable, ROOT/'dev.py', 'help'], capture_output=True, text=True)
    assert out.returncode == 0 and 'demo' in out.stdout and 'test' in out.stdout
    assert subprocess.run([sys.executable, ROOT/'dev.py', 'nonsense'], capture_output=True).returncode == 1

def test_dev_says_what_to_install_where_venv_is_missing(tmp_path):
    for f in ('dev.py','pyproject.toml'): shutil.copy(ROOT/f, tmp_path)
    (tmp_path/'fake').mkdir()
    (tmp_path/'fake'/'ensurepip.py').write_text("raise ImportError('left out')")
    env = {**os.environ, 'PYTHONPATH': str(tmp_path/'fake')}
    out = subprocess.run([sys.executable, tmp_path/'dev.py', 'demo'], capture_output=True, text=True, env=env)
    assert out.returncode == 1 and 'python3-venv' in out.stderr and not (tmp_path/'.venv').exists()

def dev_of(folder):
    "The module dev.py of a folder"
    spec = importlib.util.spec_from_file_location('dev_copy', folder/'dev.py')
    dev = importlib.util.module_from_spec(spec); spec.loader.exec_module(dev)
    return dev

def test_dev_prepares_a_commit(tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT/'dev.py', tmp_path)
    for command in (['init','-q'], ['add','.']): subprocess.run(['git', *command], cwd=tmp_path, check=True)
    dev,module,done = dev_of(tmp_path),tmp_path/'module.py',[]
    def call(*args):
        done.append(Path(args[-1]).name)
        if done[-1] == 'nbdev-export': module.write_text('exported')
    monkeypatch.setattr(dev, 'call', call)
    with pytest.raises(SystemExit, match='look at what was written'): dev.prepare(['--check'])
    assert 'written: module.py' in capsys.readouterr().out
    assert done == ['sync_settings.py','nbdev-export','nbdev-clean','test_style.py']
    dev.prepare(['--check'])
    module.write_text('edited by hand')
    dev.prepare([])
    assert 'written: module.py' in capsys.readouterr().out and module.read_text() == 'exported'
    dev.prepare(['--hook'])
    assert 'dev.py prepare --check' in (tmp_path/'.git'/'hooks'/'pre-commit').read_text()

def test_dev_mends_a_half_made_environment(tmp_path, monkeypatch):
    for f in ('dev.py','pyproject.toml'): shutil.copy(ROOT/f, tmp_path)
    import venv
    venv.create(tmp_path/'.venv', with_pip=False)
    dev = dev_of(tmp_path)
    calls = []
    monkeypatch.setattr(dev, 'call', lambda *a, **k: calls.append(a))
    assert not dev.has_pip()
    dev.setup()
    assert dev.has_pip() and len(calls) == 1 and 'install' in calls[0]
    dev.setup()
    assert len(calls) == 1
    with open(tmp_path/'pyproject.toml', 'a') as f: f.write('\n# changed\n')
    dev.setup()
    assert len(calls) == 2
