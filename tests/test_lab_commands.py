"The command lines of the lab."
import importlib.util, json, numpy as np, pandas as pd, pytest, torch
from fastcore.script import anno_parser
from fastai_jocor import __version__
from fastai_jocor.files import write_table
from fastai_jocor.lab import commands
from fastai_jocor.lab.commands import jocor_bench, jocor_train
from fastai_jocor.lab.config import RunConfig
from fastai_jocor.lab.results import run_dir
from fastai_jocor.lab.spec import grids
from lab_helpers import script

def test_train_command(tmp_path):
    out = tmp_path/'run'
    p = script('jocor_train', '--epochs', 3, '--k', 3, '--noise', 'symmetric:0.4', '--out', out, '--threads', 1)
    assert p.returncode == 0, p.stderr
    lines = p.stdout.splitlines()
    assert lines[0].split()[:4] == ['epoch','train_loss','valid_loss','accuracy'] and 'label_precision' in lines[0]
    assert [l.split()[0] for l in lines[1:4]] == ['0','1','2'] and 'jocor k=3 on digits' in p.stdout
    h,cfg = pd.read_csv(out/'history.csv'),json.loads((out/'config.json').read_text())
    assert len(h) == 3 and {'peer_0','peer_1','peer_2'} <= set(h)
    assert {'R','noise_low','noise_high','label_precision'} <= set(h) and (h.noise_low <= h.noise_high).all()
    np.testing.assert_allclose(h[['peer_0','peer_1','peer_2']].mean(axis=1), h.peer_accuracy, rtol=1e-4)
    assert (cfg['noise'], cfg['schedule'], cfg['co_lambda']) == ('symmetric:0.4','one_cycle',RunConfig().co_lambda)
    assert (out/'learning_curve.png').stat().st_size > 5000
    sizes = [v.numel() for v in torch.load(out/'model.pth', weights_only=True).values()]
    assert sum(sizes) == 3*(64*256+256+2560+10)
    result = json.loads((out/'result.json').read_text())
    assert result['ensemble_accuracy'] == pytest.approx(h.accuracy.mean(), abs=1e-5)

def test_train_command_as_in_the_paper(tmp_path):
    jocor_train(epochs=3, num_gradual=2, noise='symmetric:0.4', schedule='paper', out=str(tmp_path))
    assert pd.read_csv(tmp_path/'history.csv').R.tolist() == pytest.approx([.4]*3)

@pytest.mark.parametrize('kw,msg', [
    (dict(k=0),'k=0'), (dict(noise='gauss:.1'),"noise='gauss:.1'"), (dict(noise='symmetric:1.5'),'rate=1.5'),
    (dict(noise='human:worse:none.pt'),'does not exist'), (dict(subset=.5),'subset=0.5'),
    (dict(contrast='js'),"contrast='js'"), (dict(co_lambda=2),'co_lambda=2'), (dict(forget_rate=1.),'forget_rate=1.0'),
    (dict(num_gradual=-1),'num_gradual=-1'), (dict(rule='paper'),"rule='paper'"),
    (dict(dataset='svhn'),"dataset='svhn'"), (dict(epochs=0),'epochs=0'),
    (dict(k='2,3'),'these are 2 runs'), (dict(threads=-3),'threads=-3 must be an integer of at least 0'),
    (dict(dataset='mnist', path='/nowhere'),'no MNIST found'), (dict(options='{init: tail}'),"init='tail'")])
def test_train_command_refuses(kw, msg, tmp_path):
    with pytest.raises(SystemExit) as e: jocor_train(**kw, out=str(tmp_path/'x'))
    assert msg in str(e.value) and not (tmp_path/'x').exists()

def test_output_is_checked_before_training(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(SystemExit): jocor_train(out=str(tmp_path/'file'), epochs=10**6)

def test_help_names_each_field():
    for name in ('jocor_train','jocor_bench'):
        said = script(name, '--help').stdout
        assert 'Weight of the contrast' in said and '--precision' in said and '--schedule' in said

def test_demo_command(tmp_path):
    p = script('jocor_demo', '--out', tmp_path, '--epochs', 4, '--seeds', 2, '--n-jobs', 2)
    assert p.returncode == 0, p.stderr
    table = pd.read_csv(tmp_path/'demo.csv', index_col=0)
    assert list(table.index) == ['standard','jocor k=2','jocor k=3'] and table.loc['standard','label precision'] == '–'
    assert '6/6' in p.stdout and '±' in p.stdout and (tmp_path/'demo.png').stat().st_size > 5000

def test_cifar_by_name(tmp_path):
    from image_files import make_cifar
    from fastai_jocor.noise import cifar10_classes
    make_cifar(tmp_path/'cifar10', cifar10_classes, 6, 6)
    p = script('jocor_train', '--dataset', 'cifar10', '--path', tmp_path, '--noise', 'instance:0.3', '--subset', 40,
               '--augment', 'crop_flip', '--epochs', 2, '--bs', 20, '--out', tmp_path/'run', '--threads', 1)
    assert p.returncode == 0, p.stderr
    cfg = json.loads((tmp_path/'run'/'result.json').read_text())['config']
    assert cfg['noise'] == 'instance:0.3' and cfg['subset'] == 40 and 'noise instance:0.3' in p.stdout
    name = run_dir(tmp_path, RunConfig('cifar10', noise='symmetric:0.2', subset=40)).name
    assert name.startswith('cifar10-symmetric0.2-jocor_k2-subset40')

TOUCH = 'k: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{tmp}/touched]]'

@pytest.mark.parametrize('text,msg', [
    (TOUCH,'tag'), ('k: !!int 2','tag'), ('k: [2, 3','is not valid YAML'), ('- k: 2','must map names'),
    ('k: 2\nk: 3',"'k' occurs twice"), ('options: {a: 1, a: 2}',"'a' occurs twice"),
    ('methd: jocor',"did you mean 'method'"), ('method: jocr',"did you mean 'jocor'"),
    ('runs: [{contrst: kl}]',"did you mean 'contrast'"), ('runs: {k: 2}','runs='), ('runs: []','runs=[]'),
    ('k: []','k=[]'), ('k: [2, two]',"k='two'"), ('k: yes','k=True'), ('k: 2.0','k=2.0'), ('k: 0','k=0'),
    ('seed: [0, x]',"seed='x'"),
    ('seed: 3-1',"seed='3-1'"), ('lr: .nan','lr=nan'), ('lr: 0','lr=0.0'), ('noise: 0.5','noise=0.5'),
    ('noise: symmetric:2','rate=2.0'), ('method: null','method=None'), ('dataset: digts',"did you mean 'digits'"),
    ('schedule: papr',"did you mean 'paper'"), ('options: {restat: true}',"options={'restat': True} do not fit"),
    ('options: 3','options=3'), ('options: {init: tail}',"init='tail'"),
    ('{method: standard, options: {k: 1}}','takes none'),
    ('{method: sce, options: {alfa: 1}}',"did you mean 'alpha'"),
    ('{method: forward, noise: none}',"noise='none' has none"),
    ('{method: co_teaching, k: 1}','k=1'), ('dataset: mnist','no MNIST found'), ('dataset: cifar10','cifar10')])
def test_bench_refuses_before_anything_starts(text, msg, tmp_path):
    (tmp_path/'grid.yaml').write_text(text.replace('{tmp}', str(tmp_path)))
    with pytest.raises(SystemExit) as e:
        jocor_bench(str(tmp_path/'grid.yaml'), str(tmp_path/'out'), path=str(tmp_path/'nowhere'))
    assert msg in str(e.value) and [p.name for p in tmp_path.iterdir()] == ['grid.yaml']

def test_bench_refuses_other_arguments(tmp_path):
    for kw,msg in ((dict(grid=str(tmp_path/'none.yaml')),'none.yaml'), (dict(k='1,x'),"k='x'"),
                   (dict(k='!!int 1'),'tag'), (dict(backend='rya'),"did you mean 'ray'")):
        with pytest.raises(SystemExit) as e: jocor_bench(**kw, out=str(tmp_path/'out'))
        assert msg in str(e.value) and not (tmp_path/'out').exists()
    if not importlib.util.find_spec('ray'):
        with pytest.raises(SystemExit, match='pip install ray'): jocor_bench(backend='ray', out=str(tmp_path/'out'))

def test_bench_knows_grids_by_name(tmp_path, capsys):
    jocor_bench(list=True)
    listed = capsys.readouterr().out
    assert 'mnist_protocol\n    MNIST as in the papers: 200 epochs' in listed
    names = [o for o in listed.splitlines() if not o.startswith(' ')]
    assert names == sorted(grids()) and len(names) >= 10
    for name in names: assert f'jocor_bench {name} ' in grids()[name].read_text(encoding='utf-8')
    jocor_bench('digits', out=str(tmp_path/'r'), method='standard', seed='0', noise='none', dry_run=True)
    assert [o.split()[0] for o in capsys.readouterr().out.splitlines()] == ['open']
    with pytest.raises(SystemExit, match="no file 'digitz', and the grid 'digitz' is unknown: did you mean 'digits'"):
        jocor_bench('digitz')
    with pytest.raises(SystemExit, match="did you mean 'digits'"): jocor_bench('benchmarks/digits.yaml')

def test_bench_command(tmp_path):
    (tmp_path/'g.yaml').write_text('epochs: 2\nseed: [0-1, 5]\nruns:\n  - method: standard\n  - {k: [2, 3]}\n')
    grid = tmp_path/'g.yaml','--out',tmp_path/'r'
    p = script('jocor_bench', *grid, '--seed', '0', '--n-jobs', 1, '--pack')
    assert p.returncode == 0 and '3/3 runs, 100%' in p.stdout and '\r' not in p.stdout, p.stderr
    assert '3 runs are packed' in p.stdout
    assert sorted(o.name for o in (tmp_path/'r').iterdir()) == ['histories.csv.gz','results.jsonl']
    p = script('jocor_bench', *grid, '--dry-run')
    assert [l.split()[0] for l in p.stdout.splitlines()] == ['done']*3 + ['open']*6

@pytest.mark.parametrize('name', ('jocor_train','jocor_bench','jocor_report','jocor_demo','jocor_audit'))
def test_every_command_tells_its_version(name, capsys):
    with pytest.raises(SystemExit) as e: anno_parser(getattr(commands, name), pos=['grid']).parse_args(['--version'])
    assert e.value.code == 0 and capsys.readouterr().out == f'fastai_jocor {__version__}\n'

OWN_PARTS = """
from fastai_jocor.callback import JoCorCallback
from fastai_jocor.losses import contrasts
from fastai_jocor.lab.config import Method, methods

class Timid(JoCorCallback):
    def __init__(self, shy=.5, **kwargs):
        super().__init__(**kwargs)
        self.shy = shy

methods['timid'] = Method(Timid)
contrasts['apart'] = lambda lp: (lp.exp()*(lp-lp.mean(0))).sum((0,-1))
"""

def test_a_grid_names_the_modules_that_it_needs(tmp_path):
    (tmp_path/'parts_of_my_own.py').write_text(OWN_PARTS)
    runs = 'runs:\n  - {method: timid, options: {shy: 0.25}}\n  - {contrast: apart, co_lambda: 0.5}\n'
    (tmp_path/'grid.yaml').write_text(f'plugins: parts_of_my_own\nepochs: 1\n{runs}')
    p = script('jocor_bench', tmp_path/'grid.yaml', '--out', tmp_path/'r', '--n-jobs', 2, silent=False)
    assert p.returncode == 0 and '2/2 runs, 100%' in p.stdout, p.stderr
    assert 'FutureWarning' not in p.stderr

def test_modules_that_there_are_not(tmp_path):
    (tmp_path/'grid.yaml').write_text('plugins: [parts_of_nobody]')
    for kw,msg in ((dict(grid=str(tmp_path/'grid.yaml')), f"no parts_of_nobody.py in {tmp_path.resolve()}"),
                   (dict(plugins='parts_of_nobody'), "plugins='parts_of_nobody': there is no"),
                   (dict(plugins='../parts'), "plugins='../parts' must be the name of a module")):
        with pytest.raises(SystemExit) as e: jocor_bench(**kw, out=str(tmp_path/'out'))
        assert msg in str(e.value) and not (tmp_path/'out').exists()

def test_copies_are_made_only_after_a_review(tmp_path):
    with pytest.raises(SystemExit, match=r"copy_to='clean' needs --apply reviewed\.csv"):
        commands.jocor_audit(str(tmp_path), copy_to='clean', out=str(tmp_path/'out'))

@pytest.mark.parametrize('name', ('NA','cat'))
def test_an_audit_says_how_its_list_is_read(name, tmp_path, monkeypatch, capsys):
    suspects = pd.DataFrame(dict(item=['a.png'], given_label=[name]))
    write = lambda *args, **kwargs: write_table(suspects, tmp_path/'suspects.csv')
    monkeypatch.setattr('fastai_jocor.lab.review.audit', write)
    commands.jocor_audit('pictures', out=str(tmp_path))
    assert ('keep_default_na=False' in capsys.readouterr().out) == (name == 'NA')
