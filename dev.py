"""Set up this project and work on it: python3 dev.py VERB [options]

  demo    train on noisy digits with one, two and three networks, and show the result
  test    run all tests (options go to pytest, such as: -k losses)
  docs    render README.md and check the documentation; --run runs the notebooks first and keeps
          what they show, --check only checks, --site builds the site into _docs and checks its pages,
          --shots FOLDER keeps pictures of them, where Chromium is installed
  kaggle  print the commands that put the notebooks under kaggle/ onto Kaggle
  help    this text

The first call makes .venv and installs the project into it; later calls start at once.
"""
import hashlib, os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT/'.venv'
BIN = VENV/('Scripts' if os.name == 'nt' else 'bin')
PYTHON = BIN/('python.exe' if os.name == 'nt' else 'python')
NO_VENV = """Python's `venv` module is incomplete here.
  Debian, Ubuntu:  sudo apt install python3-venv
  Fedora:          sudo dnf install python3-pip
  others:          install Python 3.10 or newer from python.org"""

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

def kaggle(args):
    print('With the kaggle command (pip install kaggle) and a token of yours; for an account of your own,\n'
          'change fastai-jocor in the ids of kernel-metadata.json to your name:\n')
    for p in sorted((ROOT/'kaggle').glob('*/kernel-metadata.json')):
        print(f'kaggle kernels push -p {p.parent.relative_to(ROOT).as_posix()}')

def main(verb='help', *args):
    verbs = dict(demo=demo, test=test, docs=docs, kaggle=kaggle)
    if verb not in verbs:
        print(__doc__)
        sys.exit(verb not in ('help', '-h', '--help'))
    if sys.version_info < (3, 10): sys.exit(f'fastai_jocor needs Python 3.10 or newer, not {sys.version.split()[0]}')
    if verb != 'kaggle': setup()
    verbs[verb](args)

if __name__ == '__main__': main(*sys.argv[1:])
