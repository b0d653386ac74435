"Every public name says what it does, what it takes and what it gives, and a notebook shows it in use."
import ast, importlib, inspect, json, re, sys, pytest
from dataclasses import is_dataclass
from fastcore.docments import docments
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import docs

CORE = ROOT/'fastai_jocor'
MODULES = [*docs.modules(CORE), *(f'lab.{o}' for o in docs.modules(CORE/'lab'))]
MODULES.remove('all')
VARIABLE = inspect.Parameter.VAR_POSITIONAL,inspect.Parameter.VAR_KEYWORD

def tree(module): return ast.parse((CORE/f"{module.replace('.', '/')}.py").read_text(encoding='utf-8'))
def decorators(node): return ' '.join(map(ast.unparse, node.decorator_list))

def public(module):
    "Names of a module with what they stand for: those in `__all__`, and the methods that it gives to other classes"
    mod = importlib.import_module(f'fastai_jocor.{module}')
    for name in mod.__all__: yield name,getattr(mod, name)
    for node in tree(module).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith('_'): continue
        if 'patch' not in decorators(node): continue
        o = inspect.getattr_static(getattr(mod, ast.unparse(node.args.args[0].annotation)), node.name)
        yield node.name,getattr(o, 'fget', getattr(o, 'f', o))

def returns(node): return {o for o in ast.walk(node) if isinstance(o, (ast.Return,ast.Yield)) and o.value is not None}
def functions(node): return [o for o in ast.walk(node) if isinstance(o, (ast.FunctionDef,ast.Lambda)) and o is not node]

def gives(node):
    "Whether a function returns or yields a value; a command prints, and a context manager yields to a `with`"
    if re.search('call_parse|contextmanager', decorators(node)) or isinstance(node.returns, ast.Constant): return False
    return bool(returns(node) - {o for f in functions(node) for o in returns(f)})

def is_explained(o):
    "Whether a name has a docstring that is not a dataclass's own"
    doc = (o.__doc__ or '').strip()
    return bool(doc) and not (inspect.isclass(o) and is_dataclass(o) and doc.startswith(f'{o.__name__}('))

def undocumented(o, node):
    "What is missing at a function or a class"
    if not is_explained(o): yield 'docstring'
    f = vars(o).get('__init__') if inspect.isclass(o) and not is_dataclass(o) else o
    if f is None: return
    found = docments(f, full=True)
    for name,d in found.items():
        if name not in ('self','cls','return') and d.kind not in VARIABLE and not d.docment: yield f'argument {name}'
    says = 'return' in found and found['return'].docment
    if isinstance(node, ast.FunctionDef) and gives(node) and not says: yield 'return'

def problems(module):
    nodes = {o.name: o for o in tree(module).body if isinstance(o, (ast.FunctionDef,ast.ClassDef))}
    for name,o in public(module):
        if name in nodes: yield from (f'{module}.{name}: {what}' for what in undocumented(o, nodes[name]))

def used(source):
    "Names that a cell uses, other than to import them"
    nodes = list(ast.walk(ast.parse(re.sub(r'(?m)^\s*[%!].*', '', source))))
    return {o.id for o in nodes if isinstance(o, ast.Name)} | {o.attr for o in nodes if isinstance(o, ast.Attribute)}

def is_shown(cell):
    "Whether a cell is run and makes no module"
    source = ''.join(cell['source'])
    return cell['cell_type'] == 'code' and not re.search(r'(?m)^#\| *(export|slow|cuda|eval: *false)', source)

def examples(nbs=ROOT/'nbs'):
    "Names that occur in cells that are run and do not make the modules"
    hidden = lambda p: any(o.startswith(('.','_')) for o in p.relative_to(nbs).parts)
    files = [p for p in sorted(nbs.rglob('*.ipynb')) if not hidden(p)]
    cells = [c for p in files for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if is_shown(c)]
    return set().union(*(used(''.join(c['source'])) for c in cells))

@pytest.mark.parametrize('module', MODULES)
def test_public_names_are_explained(module): assert list(problems(module)) == []

def test_public_names_are_shown_in_use():
    shown = examples()
    assert [f'{m}.{name}' for m in MODULES for name,_ in public(m) if name not in shown] == []

PAGES = sorted((ROOT/'nbs'/'reference').glob('*.ipynb'))
SHOW_DOC = re.compile(r'(?m)^show_doc\(([\w.]+)')

def shown_on(page): return [name for c in docs.cells(page) for name in SHOW_DOC.findall(docs.source(c))]

def test_each_name_that_users_type_has_one_place_in_the_reference():
    from fastai_jocor import all as everything
    shown = [o for p in PAGES for o in shown_on(p)]
    assert len(shown) == len(set(shown))
    assert {'Learner.to_peers','Learner.to_single','Learner.take_heads','JoCorCallback.suspects'} <= set(shown)
    assert {o for o in shown if '.' not in o} == set(everything.__all__)

@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_a_reference_page_begins_with_what_it_is_about_and_ends_with_an_example(page):
    if page.stem == 'commands': return
    visible = [c for c in docs.cells(page) if '#| hide' not in docs.source(c)]
    kinds = [c['cell_type'] for c in visible]
    assert kinds[:3] == ['markdown','markdown','code'] and docs.source(visible[1]).startswith('```python')
    assert SHOW_DOC.search(docs.source(visible[2]))
    after = visible[next(i for i,c in enumerate(visible) if '## Example' in docs.source(c)):]
    assert any(c.get('outputs') for c in after)

def test_commands_have_their_help_in_the_reference():
    from fastai_jocor.lab import commands
    from fastcore.script import anno_parser
    cells = docs.cells(ROOT/'nbs'/'reference'/'commands.ipynb')
    text = ''.join(''.join(o.get('text', '')) for c in cells for o in c.get('outputs', []))
    for name in re.findall(r'(?m)^    (\w+)=fastai_jocor', (ROOT/'settings.ini').read_text(encoding='utf-8')):
        f = inspect.unwrap(getattr(commands, name))
        options = re.findall(r'(?m)^ +(--[\w-]+)', anno_parser(f, name).format_help())
        assert f'usage: {name}' in text and all(o in text for o in options), f'run commands.ipynb anew: {name}'

MADE = '''def f(a, b=1):
    return a

class C:
    "A class"
    def __init__(self,
        a, # First
        b=1
    ): pass
'''

def test_what_is_missing_is_found(tmp_path):
    (tmp_path/'made.py').write_text(MADE)
    spec = importlib.util.spec_from_file_location('made', tmp_path/'made.py')
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    f,c = ast.parse(MADE).body
    assert list(undocumented(made.f, f)) == ['docstring','argument a','argument b','return']
    assert list(undocumented(made.C, c)) == ['argument b']

def test_examples_are_cells_that_are_run(tmp_path):
    sources = '#| export\nf(1)', '#| slow\ng(1)', 'from made import h', 'm.k(1)\n!ls'
    cells = [dict(cell_type='code', source=o) for o in sources]
    (tmp_path/'a.ipynb').write_text(json.dumps(dict(cells=cells)))
    assert examples(tmp_path) == {'m','k'}
