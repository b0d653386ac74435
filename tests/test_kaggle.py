"The Kaggle notebooks run offline on small made data, stop in time, go on where they stopped, and describe themselves."
import json, re, pytest
import pandas as pd
from pathlib import Path

KAGGLE = Path(__file__).resolve().parent.parent/'kaggle'
SLUGS = sorted(p.parent.name for p in KAGGLE.glob('*/kernel-metadata.json'))
SOURCES = {f'{o}_sources' for o in ('dataset','competition','kernel','model')}
KEYS = {'id','title','code_file','language','kernel_type','is_private','enable_gpu','enable_internet'} | SOURCES

def notebook(slug): return json.loads((KAGGLE/slug/f'{slug}.ipynb').read_text(encoding='utf-8'))
def sources(slug, kind='code'): return [''.join(c['source']) for c in notebook(slug)['cells'] if c['cell_type'] == kind]

def run(slug, inject):
    "Run a notebook with other parameters, as papermill would: the new values follow the cell tagged `parameters`"
    from fastcore.nbio import read_nb, mk_cell
    from execnb.shell import CaptureShell
    nb = read_nb(KAGGLE/slug/f'{slug}.ipynb')
    at = next(i for i,c in enumerate(nb.cells) if 'parameters' in c.metadata.get('tags', []))
    nb.cells.insert(at+1, mk_cell(inject))
    shell = CaptureShell()
    shell.run_all(nb, exc_stop=True)
    return ''.join(''.join(o.get('text', '')) for c in nb.cells for o in c.get('outputs', []))

def test_there_are_four():
    assert SLUGS == ['jocor-cassava-clean-labels','jocor-cifar-10-quickstart','jocor-cifar-10n-human-labels',
                     'jocor-noisy-imagenette']

@pytest.mark.parametrize('slug', SLUGS)
def test_metadata(slug):
    meta = json.loads((KAGGLE/slug/'kernel-metadata.json').read_text())
    assert set(meta) == KEYS and len(meta['title']) >= 5 and meta['code_file'] == f'{slug}.ipynb'
    assert meta['id'].split('/')[1] == slug == re.sub(r'[^a-z0-9]+', '-', meta['title'].lower()) and '/' in meta['id']
    assert meta['language'] == 'python' and meta['kernel_type'] == 'notebook' and meta['enable_gpu'] is True
    assert all(isinstance(meta[k], list) for k in SOURCES)
    assert ('cassava-leaf-disease-classification' in meta['competition_sources']) == ('cassava' in slug)

@pytest.mark.parametrize('slug', SLUGS)
def test_form(slug):
    cells = notebook(slug)['cells']
    code = [c for c in cells if c['cell_type'] == 'code']
    first = ''.join(code[0]['source'])
    assert "if 'KAGGLE_KERNEL_RUN_TYPE' in os.environ:" in first
    assert first.index('KAGGLE_KERNEL_RUN_TYPE') < first.index("'install'")
    assert not any(re.search(r'pip|^!', ''.join(c['source'])) for c in code[1:])
    assert [c['metadata'].get('tags') for c in code].count(['parameters']) == 1
    assert any(c['outputs'] for c in code) and not any(o['output_type'] == 'error' for c in code for o in c['outputs'])
    assert 'results.csv' in ''.join(sources(slug)) and 'attach' in ''.join(sources(slug) + sources(slug, 'markdown'))

def epochs_of(history):
    "Epochs that a run has noted"
    return pd.read_csv(history).epoch.tolist() if history.exists() else []

RUNS = ['plain','k2'],['k2','k3'],['worse-plain','worse-k3'],['4-plain','4-k3']

@pytest.mark.parametrize('slug,runs', list(zip(SLUGS, RUNS, strict=True)))
def test_stops_in_time_and_goes_on(slug, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MPLBACKEND', 'agg')
    monkeypatch.delenv('KAGGLE_KERNEL_RUN_TYPE', raising=False)
    epochs = lambda name: epochs_of(tmp_path/'out'/'runs'/name/'history.csv')
    said = run(slug, "epochs,hours = 4,0")
    assert f'{runs[0]}: stopped after 1 of 4 epochs' in said and epochs(runs[0]) == [0] and epochs(runs[1]) == []
    assert not (tmp_path/'out'/'suspects.csv').exists()
    (tmp_path/'out').rename(tmp_path/'earlier')                       # the output of that version, attached to the next
    (tmp_path/'kaggle_input'/'version-1').mkdir(parents=True)
    (tmp_path/'earlier'/'runs').rename(tmp_path/'kaggle_input'/'version-1'/'runs')
    said = run(slug, "epochs,inputs = 4,'kaggle_input'")
    assert f'{runs[0]}: goes on after epoch 0' in said and 'stopped' not in said
    assert epochs(runs[0]) == epochs(runs[1]) == [0,1,2,3]
    folder = tmp_path/'out'/'runs'/runs[1]
    left = {f.relative_to(folder).as_posix() for f in folder.rglob('*.*')}
    assert left - {'suspects.csv'} == {'history.csv','models/model.pth'}
    results = pd.read_csv(tmp_path/'out'/'results.csv')
    assert results.epochs.tolist() == [4,4] and results.accuracy.between(0,100).all()
    if 'cassava' in slug: assert len(pd.read_csv(tmp_path/'out'/'suspects.csv')) == 20

@pytest.mark.parametrize('slug', SLUGS)
def test_says_what_to_attach(slug, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extra = '' if 'cassava' in slug else '\ninternet = False'
    with pytest.raises(FileNotFoundError, match='attach (CIFAR-10|Imagenette|the competition cassava)'):
        run(slug, f"short,inputs,out = False,'nothing','out'{extra}")
