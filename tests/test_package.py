"The wheel and the source distribution hold what they should and nothing else."
import importlib.util, shutil, subprocess, sys, tarfile, zipfile, pytest
from email import message_from_string
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import sync_settings

for module in ('build','setuptools'): pytest.importorskip(module)

SETTINGS = sync_settings.read_settings()
FILES_OF_GIT = ['git','ls-files','-co','--exclude-standard']
DIST_INFO = {'METADATA','WHEEL','RECORD','top_level.txt','entry_points.txt','licenses/LICENSE'}

def git_files():
    "Files that git holds or would take"
    found = subprocess.run(FILES_OF_GIT, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [f for f in found if (ROOT/f).is_file()]

@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "Both distributions, built from what git holds"
    src,out = tmp_path_factory.mktemp('src'),tmp_path_factory.mktemp('dist')
    for f in git_files():
        (src/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT/f, src/f)
    build = [sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, src]
    p = subprocess.run(build, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-2000:]
    return out

@pytest.fixture(scope='module')
def wheel(dist):
    file, = dist.glob('*.whl')
    return file

def modules():
    "What the wheel and the source hold of the package"
    package = ROOT/'fastai_jocor'
    kinds = '*.py','py.typed','lab/templates/*','lab/grids/*.yaml'
    return {p.relative_to(ROOT).as_posix() for o in kinds for p in package.rglob(o)}

def test_wheel(wheel):
    version = SETTINGS['version']
    assert wheel.name == f'fastai_jocor-{version}-py3-none-any.whl' and wheel.stat().st_size < 260_000
    with zipfile.ZipFile(wheel) as z: names = set(z.namelist())
    info = f'fastai_jocor-{version}.dist-info/'
    assert {n for n in names if not n.startswith(info)} == modules()
    assert {n.removeprefix(info) for n in names if n.startswith(info)} == DIST_INFO

def test_metadata(wheel):
    s = SETTINGS
    with zipfile.ZipFile(wheel) as z:
        read = lambda end: next(z.read(n).decode() for n in z.namelist() if n.endswith(end))
        meta,points = message_from_string(read('.dist-info/METADATA')),read('entry_points.txt')
    assert meta['Name'] == s['lib_name'] and meta['Version'] == s['version'] and meta['Summary'] == s['description']
    assert meta['License-Expression'] == 'Apache-2.0' and meta['Requires-Python'] == f">={s['min_python']}"
    assert meta['Description-Content-Type'] == 'text/markdown'
    required = [r for r in meta.get_all('Requires-Dist') if 'extra ==' not in r]
    assert len(required) == len(s['requirements'].split()) and any(r.startswith('torch>=') for r in required)
    urls = [o.partition(',')[0] for o in meta.get_all('Project-URL')]
    assert urls == ['Repository'] + ['Documentation']*s.getboolean('published')
    for o in s['pythons'].split(): assert f'Programming Language :: Python :: {o}' in meta.get_all('Classifier')
    for o in s['console_scripts'].split(): assert o.replace('=', ' = ') in points, o

def test_sdist(dist):
    sdist, = dist.glob('*.tar.gz')
    with tarfile.open(sdist) as t: names = {n.partition('/')[2] for n in t.getnames() if t.getmember(n).isfile()}
    kept = {n for n in names if not n.startswith('fastai_jocor.egg-info/')}
    of_the_repository = {f for f in git_files() if not f.startswith('.')}
    assert kept == of_the_repository | {'setup.cfg','PKG-INFO'} and kept >= modules()
    assert {'CHANGELOG.md','tests/test_package.py','nbs/index.ipynb','benchmarks/everyday.py','dev.py'} <= kept

def test_twine(dist):
    pytest.importorskip('twine')
    check = [sys.executable, '-m', 'twine', 'check', '--strict', *dist.iterdir()]
    p = subprocess.run(check, capture_output=True, text=True)
    assert p.returncode == 0 and p.stdout.count('PASSED') == 2, p.stdout + p.stderr
