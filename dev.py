"""Set up this project and work on it: python3 dev.py VERB [options]

  demo     train on noisy digits with one, two and three networks, and show the result
  test     run all tests (options go to pytest, such as: -k losses)
  prepare  before a commit: write the modules from the notebooks, clean the notebooks, check the style;
           --check fails where that changes a file, --hook has git do this at every commit
  docs     render README.md and check the documentation; --run runs the notebooks first and keeps
           what they show, --check only checks, --site builds the site into _docs and checks its pages,
           --shots FOLDER keeps pictures of them, where Chromium is installed
  wheels   make dist/wheels, a data set from which the notebooks under kaggle/ install without internet
  kaggle   kaggle NAME puts your Kaggle name into the notebooks' metadata, and prints the commands that push them
  release  build what would be uploaded, and try it in an environment of its own
  help     this text

The first call makes .venv and installs the project into it; later calls start at once.
"""
import hashlib, json, os, re, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT/'.venv'
BIN = VENV/('Scripts' if os.name == 'nt' else 'bin')
PYTHON = BIN/('python.exe' if os.name == 'nt' else 'python')
NO_VENV = """Python's `venv` module is incomplete here.
  Debian, Ubuntu:  sudo apt install python3-venv
  Fedora:          sudo dnf install python3-pip
  others:          install Python 3.10 or newer from python.org"""
HOOK = '#!/bin/sh\nexec python3 dev.py prepare --check\n'

def call(*args, **kwargs):
    "Run a command in the project's folder, and stop with its exit code if it fails"
    code = subprocess.call([str(a) for a in args], cwd=ROOT, **kwargs)
    if code: sys.exit(code)

def stamp():
    "What the installation depends on"
    text = (ROOT/'pyproject.toml').read_text(encoding='utf-8') + sys.version + str(ROOT)
    return hashlib.sha256(text.encode()).hexdigest()

def has_pip():
    "Whether .venv is whole: not interrupted while it was made, nor left behind by another Python"
    if not PYTHON.exists(): return False
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.call([str(PYTHON), '-m', 'pip', '--version'], **silent) == 0

def setup():
    "Make .venv and install the project, unless that was done for this very configuration"
    done = VENV/'installed'
    if PYTHON.exists() and done.exists() and done.read_text() == stamp(): return
    try: import ensurepip, venv
    except ImportError: sys.exit(NO_VENV)
    print('Setting up .venv (the first time takes some minutes: PyTorch is large)', flush=True)
    if not has_pip(): venv.create(VENV, with_pip=True, clear=True)
    call(PYTHON, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '-e', f'{ROOT}[dev]')
    done.write_text(stamp())

def demo(args): call(BIN/'jocor_demo', *args, env={**os.environ, 'PYTHONWARNINGS': 'ignore'})
def test(args): call(PYTHON, '-m', 'pytest', *args)
def docs(args): call(PYTHON, ROOT/'tools'/'docs.py', *args)
def release(args): call(PYTHON, ROOT/'tools'/'release.py', *args)

def git(*args): return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout

def sources():
    "What `prepare` may write, as it is now"
    names = git('ls-files', '-co', '--exclude-standard', '*.py', '*.ipynb', '*.toml', '*.cff').splitlines()
    return {o: (ROOT/o).read_bytes() for o in names if (ROOT/o).is_file()}

def prepare(args):
    if '--hook' in args:
        hook = ROOT/git('rev-parse', '--git-path', 'hooks/pre-commit').strip()
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(HOOK, newline='\n')
        hook.chmod(0o755)
        return print(f'written: {hook}')
    before = sources()
    call(PYTHON, ROOT/'tools'/'sync_settings.py')
    for command in ('nbdev-export','nbdev-clean'): call(BIN/command)
    changed = [o for o,text in sources().items() if before.get(o) != text]
    for o in changed: print(f'written: {o}')
    call(PYTHON, '-m', 'pytest', '-q', ROOT/'tests'/'test_style.py')
    if changed and '--check' in args: sys.exit('look at what was written, add it, and commit again')

def settings(key):
    "A list of settings.ini"
    return re.search(rf'(?m)^{key} = (.*)$', (ROOT/'settings.ini').read_text(encoding='utf-8'))[1].split()

def wheels(args):
    out = ROOT/'dist'/'wheels'
    shutil.rmtree(out, ignore_errors=True)
    call(PYTHON, '-m', 'build', '--no-isolation', '--wheel', '--outdir', out, stdout=subprocess.DEVNULL)
    platform = '--platform=manylinux_2_28_x86_64','--platform=manylinux2014_x86_64','--only-binary=:all:','--no-deps'
    for python in settings('pythons'): # one of the wheels is compiled
        options = [*platform, '--python-version', python, '-d', out]
        call(PYTHON, '-m', 'pip', 'download', '-q', *options, *settings('wheels'))
    about = dict(title='fastai_jocor wheels', id=f'{owner()}/fastai-jocor-wheels', licenses=[dict(name='other')])
    (out/'dataset-metadata.json').write_text(json.dumps(about, indent=2))
    for p in sorted(out.glob('*.whl')): print(p.relative_to(ROOT).as_posix())

def notebooks(): return sorted((ROOT/'kaggle').glob('*/kernel-metadata.json'))
def owner(): return json.loads(notebooks()[0].read_text(encoding='utf-8'))['id'].partition('/')[0]

def kaggle(args):
    if args: rename(owner(), args[0])
    if owner() == 'YOUR-NAME': sys.exit('python3 dev.py kaggle NAME, with your name on Kaggle')
    print('With the kaggle command (pip install kaggle) and a token of yours:\n\n'
          'python3 dev.py wheels && kaggle datasets create -p dist/wheels')
    for p in notebooks(): print(f'kaggle kernels push -p {p.parent.relative_to(ROOT).as_posix()}')

def rename(old, new):
    "Put the name of an account into the notebooks' metadata"
    if not re.fullmatch(r'[A-Za-z0-9-]+', new): sys.exit(f'{new!r} must be a name on Kaggle: letters, digits and -')
    for p in notebooks():
        p.write_text(p.read_text(encoding='utf-8').replace(f'"{old}/', f'"{new}/'), encoding='utf-8', newline='\n')

def main(verb='help', *args):
    verbs = {f.__name__: f for f in (demo, test, prepare, docs, wheels, kaggle, release)}
    if verb not in verbs:
        print(__doc__)
        sys.exit(verb not in ('help', '-h', '--help'))
    if sys.version_info < (3, 10): sys.exit(f'fastai_jocor needs Python 3.10 or newer, not {sys.version.split()[0]}')
    if verb != 'kaggle': setup()
    verbs[verb](args)

if __name__ == '__main__': main(*sys.argv[1:])
