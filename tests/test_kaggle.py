"The Kaggle notebooks run offline on small made data, stop in time, go on where they stopped, and describe themselves."
import json, re, shutil, subprocess, sys, zipfile, pytest
import numpy as np, pandas as pd
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KAGGLE = ROOT/'kaggle'
SLUGS = sorted(p.parent.name for p in KAGGLE.glob('*/kernel-metadata.json'))
SOURCES = {f'{o}_sources' for o in ('dataset','competition','kernel','model')}
KEYS = {'id','title','code_file','language','kernel_type','is_private','enable_gpu','enable_internet'} | SOURCES

def notebook(slug): return json.loads((KAGGLE/slug/f'{slug}.ipynb').read_text(encoding='utf-8'))
def sources(slug, kind='code'): return [''.join(c['source']) for c in notebook(slug)['cells'] if c['cell_type'] == kind]

# --- made data: CIFAR-10 and the competition in their folders

def picture(file, pixels):
    from PIL import Image
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).resize((32,32)).convert('RGB').save(file)

def made_cifar(folder, n_train=60, n_test=20):
    "Digits in the folders of CIFAR-10, and a file like CIFAR-10N's with errors that go to the next class"
    import torch
    from sklearn.datasets import load_digits
    from fastai_jocor.noise import cifar10_classes, PairFlip
    data = load_digits()
    for c,name in enumerate(cifar10_classes):
        for i,im in enumerate(data.images[data.target==c][:n_train+n_test]):
            part,i = ('train',i) if i < n_train else ('test',i-n_train)
            picture(folder/'cifar10'/part/name/f'{i:04d}.png', im*15)
    clean = np.random.RandomState(0).permutation(np.repeat(np.arange(10), n_train))
    given = {f'{name}_label': PairFlip(rate).corrupt(clean, 10) for name,rate in dict(worse=.4, aggre=.1).items()}
    torch.save(dict(clean_label=clean, **given), folder/'CIFAR-10_human.pt')

def made_cassava(folder, n=36):
    "A folder of the competition's layout: five colours, one label in ten wrong"
    rs,folder,rows = np.random.RandomState(0),folder/'cassava',[]
    for c in range(5):
        for i in range(n):
            given = (c+rs.randint(1,5))%5 if rs.rand() < .1 else c
            rows.append((f'{c}{i:03d}.jpg', given))
            noise = rs.randint(0, 80, (32,32,3))
            picture(folder/'train_images'/rows[-1][0], noise + 40*np.array([c, 4-c, (2*c)%5]))
    pd.DataFrame(rows, columns=['image_id','label']).to_csv(folder/'train.csv', index=False)
    (folder/'label_num_to_disease_map.json').write_text(json.dumps({str(i): f'disease {i}' for i in range(5)}))

def made_imagenette(folder, n_train=60, n_valid=20):
    "Digits in the layout of Noisy Imagenette, half of the training labels wrong"
    from sklearn.datasets import load_digits
    data,rs,rows,folder = load_digits(),np.random.RandomState(0),[],folder/'imagenette2-160'
    for c in range(10):
        for i,im in enumerate(data.images[data.target==c][:n_train+n_valid]):
            path = f"{'train' if i < n_train else 'val'}/n{c:08d}/{i}.JPEG"
            picture(folder/path, im*15)
            given = (c+rs.randint(1, 10))%10 if i < n_train and rs.rand() < .5 else c
            rows.append((path, f'n{c:08d}', f'n{given:08d}', i >= n_train))
    table = pd.DataFrame(rows, columns=['path','noisy_labels_0','noisy_labels_50','is_valid'])
    table.to_csv(folder/'noisy_imagenette.csv', index=False)

def made_data(slug, folder):
    "What a notebook needs, in small"
    makes = {'jocor-cassava-clean-labels': made_cassava, 'jocor-noisy-imagenette': made_imagenette}
    makes.get(slug, made_cifar)(folder)

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

# --- what a notebook says of itself

def test_there_are_four():
    assert SLUGS == ['jocor-cassava-clean-labels','jocor-cifar-10-quickstart','jocor-cifar-10n-human-labels',
                     'jocor-noisy-imagenette']

@pytest.mark.parametrize('slug', SLUGS)
def test_metadata(slug):
    meta = json.loads((KAGGLE/slug/'kernel-metadata.json').read_text())
    assert set(meta) == KEYS and len(meta['title']) >= 5 and meta['code_file'] == f'{slug}.ipynb'
    assert meta['id'].split('/')[1] == slug == re.sub(r'[^a-z0-9]+', '-', meta['title'].lower()) and '/' in meta['id']
    assert meta['language'] == 'python' and meta['kernel_type'] == 'notebook' and meta['enable_gpu'] is True
    assert all(isinstance(meta[k], list) for k in SOURCES) and meta['enable_internet'] is False
    assert f"{meta['id'].split('/')[0]}/fastai-jocor-wheels" in meta['dataset_sources']
    assert ('cassava-leaf-disease-classification' in meta['competition_sources']) == ('cassava' in slug)

@pytest.mark.parametrize('slug', SLUGS)
def test_form(slug):
    cells = notebook(slug)['cells']
    code = [c for c in cells if c['cell_type'] == 'code']
    assert not any(re.search(r'\bpip\b|^!', ''.join(c['source'])) for c in code[1:])
    assert [c['metadata'].get('tags') for c in code].count(['parameters']) == 1
    assert not any(o['output_type'] == 'error' for c in code for o in c['outputs'])
    assert 'results.csv' in ''.join(sources(slug)) and 'attach' in ''.join(sources(slug) + sources(slug, 'markdown'))

@pytest.mark.parametrize('slug', SLUGS)
def test_results_are_of_real_data_or_none_are_shown(slug):
    code,text = ''.join(sources(slug)),''.join(sources(slug, 'markdown'))
    assert not re.search('stand.in|load_digits|load_sample_images', code+text)
    shown = any(c.get('outputs') for c in notebook(slug)['cells'])
    assert shown != ('No results are shown' in text)

# --- installing

def test_first_cell_is_the_same_everywhere():
    cells = {sources(slug)[0] for slug in SLUGS}
    assert len(cells) == 1 and "if 'KAGGLE_KERNEL_RUN_TYPE' in os.environ: install()" in cells.pop()

def first_cell(monkeypatch, address=''):
    "What the first cell defines, where no notebook of Kaggle runs"
    monkeypatch.delenv('KAGGLE_KERNEL_RUN_TYPE', raising=False)
    names = {}
    exec(re.sub(r"ADDRESS = '.*'", f"ADDRESS = '{address}'", sources(SLUGS[0])[0]), names)
    return names['install']

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    pytest.importorskip('build')
    src,out = tmp_path_factory.mktemp('src')/'s',tmp_path_factory.mktemp('data set')/'wheels'
    shutil.copytree(ROOT/'fastai_jocor', src/'fastai_jocor', ignore=shutil.ignore_patterns('__pycache__'))
    for f in ('pyproject.toml','README.md','LICENSE'): shutil.copy(ROOT/f, src)
    build = [sys.executable, '-m', 'build', '--no-isolation', '--wheel', '--outdir', out, src]
    subprocess.run(build, check=True, capture_output=True)
    return next(out.glob('*.whl'))

def test_installs_from_attached_wheels(wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PIP_TARGET', str(tmp_path))
    monkeypatch.setenv('PIP_NO_DEPS', '1')
    first_cell(monkeypatch)(wheel.parent.parent)
    assert 'Successfully installed fastai' in capsys.readouterr().out
    assert (tmp_path/'fastai_jocor'/'all.py').is_file() and (tmp_path/'fastai_jocor'/'lab'/'grids').is_dir()

def test_says_why_it_cannot_be_installed(tmp_path, monkeypatch):
    monkeypatch.setenv('PIP_TARGET', str(tmp_path/'site'))
    monkeypatch.setenv('PIP_NO_DEPS', '1')
    with pytest.raises(ImportError, match='attach the data set of wheels that `python3 dev.py wheels` makes'):
        first_cell(monkeypatch)(tmp_path)
    with pytest.raises(ImportError, match='from file:///nowhere: turn the internet on, or attach the wheels'):
        first_cell(monkeypatch, 'file:///nowhere')(tmp_path)
    with zipfile.ZipFile(tmp_path/'fastai_jocor-0.1.0-py3-none-any.whl', 'w'): pass
    with pytest.raises(ImportError, match='make the data set of wheels again'): first_cell(monkeypatch)(tmp_path)

def test_wheels_need_nothing_that_is_left_out():
    "What fastai needs beyond a machine with PyTorch is among the wheels; the rest such a machine has"
    sys.path.insert(0, str(ROOT/'tools'))
    from sync_settings import read_settings
    names = {re.split('[<>=]', o)[0] for o in read_settings()['wheels'].split()}
    assert {'fastai','fastcore','fastprogress','fasttransform','fastdownload','plum-dispatch','filelock'} <= names

def test_account_in_the_metadata(tmp_path):
    shutil.copytree(KAGGLE, tmp_path/'kaggle')
    shutil.copy(ROOT/'dev.py', tmp_path)
    command = [sys.executable, tmp_path/'dev.py', 'kaggle']
    dev = lambda *args: subprocess.run([*command, *args], capture_output=True, text=True)
    assert 'with your name on Kaggle' in dev().stderr
    assert "'a b' must be a name on Kaggle" in dev('a b').stderr
    p = dev('some-name')
    assert p.returncode == 0
    assert re.findall(r'(?m)^kaggle kernels push -p (.*)$', p.stdout) == [f'kaggle/{slug}' for slug in SLUGS]
    meta = json.loads((tmp_path/'kaggle'/SLUGS[0]/'kernel-metadata.json').read_text())
    assert meta['id'] == f'some-name/{SLUGS[0]}' and 'some-name/fastai-jocor-wheels' in meta['dataset_sources']
    assert dev().returncode == 0

# --- running

def epochs_of(history):
    "Epochs that a run has noted"
    return pd.read_csv(history).epoch.tolist() if history.exists() else []

RUNS = {'jocor-cassava-clean-labels': ['plain','k2'], 'jocor-cifar-10-quickstart': ['k2','k3'],
        'jocor-cifar-10n-human-labels': ['worse-plain','worse-k3'],
        'jocor-noisy-imagenette': ['4-plain','4-k3']}

@pytest.mark.parametrize('slug', RUNS)
def test_stops_in_time_and_goes_on(slug, tmp_path, monkeypatch):
    runs = RUNS[slug]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MPLBACKEND', 'agg')
    monkeypatch.delenv('KAGGLE_KERNEL_RUN_TYPE', raising=False)
    made_data(slug, tmp_path/'data')
    epochs = lambda name: epochs_of(tmp_path/'out'/'runs'/name/'history.csv')
    part = '; part,bs = None,32' if 'cifar' in slug else ''
    said = run(slug, f'epochs,hours = 4,0{part}')
    assert f'{runs[0]}: stopped after 1 of 4 epochs' in said and epochs(runs[0]) == [0] and epochs(runs[1]) == []
    assert not (tmp_path/'out'/'suspects.csv').exists()
    (tmp_path/'out').rename(tmp_path/'earlier')                       # the output of that version, attached to the next
    (tmp_path/'data'/'version-1').mkdir()
    (tmp_path/'earlier'/'runs').rename(tmp_path/'data'/'version-1'/'runs')
    said = run(slug, f'epochs = 4{part}')
    assert f'{runs[0]}: goes on after epoch 0' in said and 'stopped' not in said
    assert epochs(runs[0]) == epochs(runs[1]) == [0,1,2,3]
    folder = tmp_path/'out'/'runs'/runs[1]
    left = {f.relative_to(folder).as_posix() for f in folder.rglob('*.*')}
    assert left - {'suspects.csv'} == {'history.csv','models/model.pth'}
    results = pd.read_csv(tmp_path/'out'/'results.csv')
    assert results.epochs.tolist() == [4,4] and results.accuracy.between(0,100).all()
    if 'cassava' in slug: assert len(pd.read_csv(tmp_path/'out'/'suspects.csv')) <= 20

@pytest.mark.parametrize('slug', RUNS)
def test_says_what_to_attach(slug, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='attach (CIFAR-10|Imagenette|the competition cassava)'):
        run(slug, "short,inputs,out = False,'nothing','out'")
