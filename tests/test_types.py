"A type checker accepts right calls of what users type, and finds wrong ones."
import inspect, subprocess, sys, pytest
from pathlib import Path
from fastai_jocor import all as everything

ROOT = Path(__file__).resolve().parent.parent

# fastai has no types, so that what its `import *` brings is not known; reading torch's would take a minute
CONFIG = '''
[mypy]
python_version = 3.10
ignore_missing_imports = True
[mypy-torch.*,torchvision.*,fastai.*,fastcore.*,numpy.*,pandas.*,sklearn.*,scipy.*,matplotlib.*,PIL.*]
follow_imports = skip
[mypy-fastai_jocor.*]
disable_error_code = arg-type, attr-defined, call-arg, index, misc, name-defined, no-redef, operator, return-value,
    union-attr, var-annotated
[mypy-fastai_jocor.lab.commands]
ignore_errors = True
'''

RIGHT = '''
from fastai_jocor.all import *
cb = JoCorCallback(k=3, contrast='ce', prune='exact', forget_rate=.2, co_lambda=None, rule=None)
JoCorCallback(forget_rate='auto').suspects(5)
cb = JoCorCallback.paper(k=2, forget_rate=.5)
Checkpoint(file='run.pth')
CoTeachingCallback(forget_rate=.2)
noise: LabelNoise|None = make_noise('symmetric:0.2')
record = Symmetric(.2).corrupt([0,1,1], 2)
dls = digits_dls(noise=Symmetric(.2), seed=1)
dls = cifar10_dls('data', noise='asymmetric:0.4', subset=.1)
def first(audit: LabelAudit, ledger: Ledger) -> None:
    audit.suspects(10, part='train').head()
    ledger.frame().head()
'''

WRONG = {
    "JoCorCallback(contrast='klx')": "Literal['klx']",
    "JoCorCallback(k='3')": 'expected "int"',
    "JoCorCallback(prune=True)": "'exact', 'approx'",
    "JoCorCallback(rule='evidences')": "'evidence', 'schedule'",
    "Symmetric('0.2')": 'expected "float"',
    "select_small(1, 2, 3, 4, 5)": 'Too many arguments',
    "JoCorCalback(k=3)": 'is not defined'}

@pytest.fixture(scope='module')
def said(tmp_path_factory):
    "What mypy says of the package and of two scripts that use it"
    pytest.importorskip('mypy')
    folder = tmp_path_factory.mktemp('types')
    (folder/'mypy.ini').write_text(CONFIG)
    (folder/'right.py').write_text(RIGHT)
    (folder/'wrong.py').write_text('\n'.join(['from fastai_jocor.all import *', *WRONG]))
    check = [sys.executable, '-m', 'mypy', '--config-file', folder/'mypy.ini', '--cache-dir', folder/'cache',
             ROOT/'fastai_jocor', folder/'right.py', folder/'wrong.py']
    return subprocess.run(check, cwd=folder, capture_output=True, text=True).stdout.splitlines()

def of(said, name): return [o for o in said if Path(o.partition(':')[0]).name == name]

def test_package(said):
    "Signatures of the package name types, and `None` where it may be given"
    assert said and not [o for o in said if not o.startswith(('wrong.py','right.py','Found'))]

def test_right_calls(said): assert not of(said, 'right.py')

@pytest.mark.parametrize('line', WRONG)
def test_wrong_calls(said, line):
    found = [o for o in of(said, 'wrong.py') if o.split(':')[1] == str(list(WRONG).index(line)+2)]
    assert found and WRONG[line] in found[0]

def test_package_is_marked_as_typed(): assert (ROOT/'fastai_jocor'/'py.typed').is_file()

def public():
    "Functions and classes that users type, with the parameters that they take"
    for name in everything.__all__:
        o = getattr(everything, name)
        f = getattr(o, '__init__', o) if inspect.isclass(o) else o
        if not getattr(f, '__module__', '').startswith('fastai_jocor'): continue
        yield name,inspect.signature(f, follow_wrapped=False).parameters.values()

def test_annotations_are_types():
    "Also as they are shown: no built-in function, and a parameter that may be `None` says what else it may be"
    for name,params in public():
        for p in params:
            assert p.annotation is not callable, f'{name}: {p}'
            assert p.default is not None or p.annotation is not p.empty, f'{name}: {p}'
