"Every public name says what it does, what it takes and what it gives, and a notebook shows it in use."
import ast, importlib, inspect, json, re, pytest
from dataclasses import is_dataclass
from fastcore.docments import docments
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = 'losses selection peers noise data callback methods audit bench report'.split()

def tree(module): return ast.parse((ROOT/'fastai_jocor'/f'{module}.py').read_text(encoding='utf-8'))
def decorators(node): return ' '.join(map(ast.unparse, node.decorator_list))

def public(module):
    "Names of a module with what they stand for: those in `__all__`, and the methods that it gives to other classes"
    mod = importlib.import_module(f'fastai_jocor.{module}')
    for name in mod.__all__: yield name,getattr(mod, name)
    for node in tree(module).body:
        if isinstance(node, ast.FunctionDef) and 'patch' in decorators(node):
            o = inspect.getattr_static(getattr(mod, ast.unparse(node.args.args[0].annotation)), node.name)
            yield node.name,getattr(o, 'fget', o)

def gives(node):
    "Whether a function returns or yields a value, by its code; a command prints, and a context manager yields to a `with`"
    if re.search('call_parse|contextmanager', decorators(node)) or isinstance(node.returns, ast.Constant): return False
    inner = [o for f in ast.walk(node) if isinstance(f, (ast.FunctionDef,ast.Lambda)) and f is not node for o in ast.walk(f)]
    return any(isinstance(o, (ast.Return,ast.Yield)) and o.value is not None and o not in inner for o in ast.walk(node))

def undocumented(o, node):
    "What is missing at a function or a class"
    if not (o.__doc__ or '').strip() or inspect.isclass(o) and is_dataclass(o) and o.__doc__.startswith(f'{o.__name__}('): yield 'docstring'
    f = vars(o).get('__init__') if inspect.isclass(o) and not is_dataclass(o) else o
    if f is None: return
    docs = docments(f, full=True)
    for name,d in docs.items():
        if name not in ('self','cls','return') and d.kind not in (inspect.Parameter.VAR_POSITIONAL,inspect.Parameter.VAR_KEYWORD) and not d.docment: yield f'argument {name}'
    if isinstance(node, ast.FunctionDef) and gives(node) and not ('return' in docs and docs['return'].docment): yield 'return'

def problems(module):
    nodes = {o.name: o for o in tree(module).body if isinstance(o, (ast.FunctionDef,ast.ClassDef))}
    for name,o in public(module):
        if name in nodes: yield from (f'{module}.{name}: {what}' for what in undocumented(o, nodes[name]))

def used(source):
    "Names that a cell uses, other than to import them"
    nodes = list(ast.walk(ast.parse(re.sub(r'(?m)^\s*[%!].*', '', source))))
    return {o.id for o in nodes if isinstance(o, ast.Name)} | {o.attr for o in nodes if isinstance(o, ast.Attribute)}

def examples(nbs=ROOT/'nbs'):
    "Names that occur in cells that are run and do not make the modules"
    cells = [''.join(c['source']) for p in sorted(nbs.rglob('*.ipynb')) if not any(o.startswith(('.','_')) for o in p.relative_to(nbs).parts)
             for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    return set().union(*(used(s) for s in cells if not re.search(r'(?m)^#\| *(export|slow|cuda|eval: *false)', s)))

@pytest.mark.parametrize('module', MODULES)
def test_public_names_are_explained(module): assert list(problems(module)) == []

def test_public_names_are_shown_in_use():
    shown = examples()
    assert [f'{m}.{name}' for m in MODULES for name,_ in public(m) if name not in shown] == []

def test_all_modules_are_walked():
    assert set(MODULES) == {p.stem for p in (ROOT/'fastai_jocor').glob('*.py')} - {'__init__','_modidx','all'}

def test_what_is_missing_is_found(tmp_path):
    source = 'def f(a, b=1):\n    return a\n\nclass C:\n    "A class"\n    def __init__(self,\n        a, # First\n        b=1\n    ): pass\n'
    (tmp_path/'made.py').write_text(source)
    spec = importlib.util.spec_from_file_location('made', tmp_path/'made.py')
    made = importlib.util.module_from_spec(spec); spec.loader.exec_module(made)
    f,c = ast.parse(source).body
    assert list(undocumented(made.f, f)) == ['docstring','argument a','argument b','return']
    assert list(undocumented(made.C, c)) == ['argument b']
    cells = [dict(cell_type='code', source=s) for s in ('#| export\nf(1)', '#| slow\ng(1)', 'from made import h', 'm.k(1)\n!ls')]
    (tmp_path/'a.ipynb').write_text(json.dumps(dict(cells=cells)))
    assert examples(tmp_path) == {'m','k'}
