"What is prepared for a GPU, tried on the CPU."
import os, re, sys, tarfile, time, zipfile, pandas as pd, pytest, torch
from configparser import ConfigParser
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from fastai_jocor.lab.config import RunConfig
from fastai_jocor.lab.results import finished, read_runs, run_dir
from fastai_jocor.lab.run import run
from image_files import make_cifar
from learners import digits

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'benchmarks'))
import gpu, gpu_check, gpu_everyday, gpu_pack, gpu_protocol, gpu_step

def arguments(out, *more, until=300):
    return gpu.parser().parse_args(['--device=cpu','--tiny','--procs=0',f'--out={out}',f'--path={out/"none"}',
        f'--until={time.time()+until}', *more])

def part(name, out, **kwargs):
    "Run a part in this process; gives its findings, and leaves out those of other parts"
    gpu.run_here(arguments(out, f'--one={name}', **kwargs))
    return {o['what']: o for o in gpu.lines(out) if o['part'] == name}

# --- each part

def test_check(tmp_path, monkeypatch):
    (tmp_path/'tests').mkdir()
    (tmp_path/'tests'/'test_some.py').write_text('def test_good(): pass\ndef test_bad(): assert 1 == 2\n')
    monkeypatch.setattr(gpu_check, 'ROOT', tmp_path)
    monkeypatch.setattr(gpu_check, 'test_command', lambda args: ['tests/test_some.py','--noconftest'])
    found = part('check', tmp_path)
    assert found['tests']['passed'] == 1 == found['tests']['failed'] and found['tests']['exit'] == 1
    assert found['test']['name'] == 'tests/test_some.py::test_bad' and '1 == 2' in found['test']['why']
    assert found['evidence: does a step wait']['skipped'] == 'nothing waits for a CPU'
    assert found['schedule: as on a CPU']['difference'] == 0
    assert not [o for o in found.values() if 'error' in o]

def test_a_difference_is_seen(tmp_path, monkeypatch):
    whole,seen = gpu_check.learner,[]
    def other(device, **kwargs):
        seen.append(device)
        return whole(device, **(kwargs | dict(forget_rate=.1*len(seen))))
    monkeypatch.setattr(gpu_check, 'learner', other)
    assert not gpu_check.differs(arguments(tmp_path), 'schedule', 1e-4)['equal']

def test_step(tmp_path):
    found = part('step', tmp_path)
    assert not [o for o in found.values() if 'error' in o]
    assert {f'7-layer network k={k} {way}' for k in (1,2) for way in gpu_step.ways('cpu')} < set(found)
    of = found['7-layer network k=2 usual']
    assert of['ms'] > 0 and of['floor_ms'] == max(of['arithmetic_ms'], of['memory_ms'])
    assert 'graphs' in found['graphs']['skipped'] and {'graphs','in_turn'} < set(gpu_step.ways('cuda'))

def test_what_a_step_needs():
    need = gpu_step.needs(lambda: torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU()), (8,10))
    assert need['weights'] == 220 and need['given'] == 2*8*20
    assert need['flops'] == 2*8*10*20 * 2 # forward, and the gradient of the weights; none of the input
    need,rate = dict(flops=1e9, weights=0, given=0),dict(float32=1e12, copy=1.)
    assert gpu_step.floor(need, 2, rate, 'float32')['floor_ms'] == 2

def test_a_step_comes_late(tmp_path):
    found = part('step', tmp_path, until=-1)
    assert found['7-layer network k=2 usual']['error'] == 'no time was left'

@pytest.mark.parametrize('name', ('protocol','mnist'))
def test_runs_go_on(name, tmp_path):
    assert part(name, tmp_path)['done before']['runs'] == 0
    assert part(name, tmp_path)['done before']['runs'] == 4
    assert len(read_runs(tmp_path/name)) == 4 and sorted(o.name for o in (tmp_path/name).iterdir()) == [
        'histories.csv.gz','results.jsonl']

def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    cfg = RunConfig(epochs=3, method='jocor', k=2)
    whole = run(cfg, verbose=False)[1]
    clock = iter((0,0,0,9)) # before the run, and before its three epochs
    with monkeypatch.context() as m:
        m.setattr(gpu_protocol, 'time', SimpleNamespace(time=lambda: next(clock)))
        assert gpu_protocol.train(tmp_path, tmp_path, 5, cfg) is None
    d = run_dir(tmp_path, cfg)
    assert len(pd.read_csv(d/'history.csv')) == 2 and (d/'checkpoint.pth').exists() and not (d/'result.json').exists()
    assert gpu_protocol.train(tmp_path, tmp_path, time.time()+300, cfg)['epochs'] == 3
    pd.testing.assert_frame_equal(pd.read_csv(d/'history.csv'), whole, check_dtype=False, atol=1e-5)

@pytest.mark.filterwarnings('ignore:graphs=True')
def test_a_run_with_graphs_is_the_same_run(tmp_path):
    cfg = RunConfig(epochs=1, method='jocor', k=2)
    graphed = gpu_protocol.WithGraphs(**vars(cfg))
    assert [type(o).__name__ for o in graphed.callback().parts].count('Graphs') == 1
    d = run_dir(tmp_path, cfg)
    found = run(graphed, d, verbose=False, extras=False, resume=True)[2]
    assert found['ensemble_accuracy'] == run(cfg, verbose=False)[2]['ensemble_accuracy'] and finished(d, cfg)

def test_a_run_that_fails_is_told(tmp_path):
    cfg = RunConfig(dataset='cifar10', epochs=1)
    assert gpu_protocol.train(tmp_path, tmp_path, time.time()+300, cfg).startswith('FileNotFoundError: path')

@pytest.mark.parametrize('name,what', (('protocol','cifar10'), ('mnist','MNIST')))
def test_data_that_are_missing(name, what, tmp_path):
    args = arguments(tmp_path)
    args.tiny = False
    with pytest.raises(FileNotFoundError, match=f'holds no {what}'): getattr(gpu_protocol, name)(args, None)

def test_images_are_decoded_once(tmp_path, monkeypatch):
    from fastai_jocor.lab import datasets
    make_cifar(tmp_path/'cifar10')
    plain = datasets.cifar10_dls(tmp_path, progress=False)
    gpu_protocol.decode(tmp_path)
    gpu_protocol.begin(tmp_path, 'cpu')
    monkeypatch.setattr(datasets, '_read_items', lambda *args, **kwargs: pytest.fail('decoded again'))
    stored = datasets.cifar10_dls(tmp_path, progress=False)
    for a,b in zip(plain.loaders, stored.loaders, strict=True):
        assert torch.equal(a.store.images, b.store.images) and (a.labels == b.labels).all() and a.vocab == b.vocab

def test_everyday(tmp_path):
    found = part('everyday', tmp_path)
    assert {o.split()[4] for o in found} == {'plain','jocor3'} and not [o for o in found.values() if 'error' in o]
    rows = pd.read_csv(tmp_path/'everyday.csv')
    assert rows.method.tolist() == ['plain','jocor3'] and (rows.accuracy > .3).all()
    part('everyday', tmp_path)
    assert len(pd.read_csv(tmp_path/'everyday.csv')) == 2

def test_rows_of_another_machine(tmp_path):
    from everyday import add_row, KEY, take_rows
    def row(seed, accuracy, data='clothing', epochs=15):
        return dict(zip(KEY, (data,'clean',epochs,3e-3,'plain',seed)), accuracy=accuracy)
    for o in (row(0, .1), row(1, .2)): add_row(o, tmp_path/'old')
    for o in (row(1, .3), row(2, .4, 'digits'), row(3, .5, epochs=99), row(4, .6)): add_row(o, tmp_path/'new')
    take_rows(tmp_path/'new', tmp_path/'old')
    assert pd.read_csv(tmp_path/'old').accuracy.tolist() == [.4,.1,.3,.6,.5] # the last one is no cell of the grid

def test_rows_of_data_that_are_there(tmp_path):
    from everyday import Cell, cells
    args = arguments(tmp_path/'out', f'--path={tmp_path}')
    args.tiny = False
    assert not gpu_everyday.keys(args, cells, Cell)
    (tmp_path/'clothing').mkdir()
    keys = gpu_everyday.keys(args, cells, Cell)
    assert len(keys) == (3+2)*3*4 and {c.data for c,_,_ in keys} == {'clothing_photos','clothing_timm'}
    assert {o[1] for o in keys[:30]} == {'plain','jocor3'}

def test_loader(tmp_path):
    assert all(o['images_a_second'] > 0 for o in part('loader', tmp_path).values())

def test_the_loss_stays_on_the_device(monkeypatch):
    "The recorder keeps the same numbers, and does not read them in a step"
    plain,learn = digits(),digits(cbs=gpu_step.DeviceLoss())
    for o in (plain,learn): o.fit(2, 1e-3)
    assert torch.allclose(torch.stack(plain.recorder.losses), torch.stack(learn.recorder.losses))
    assert plain.recorder.values[-1][0] == pytest.approx(learn.recorder.values[-1][0])
    assert type(learn.recorder.smooth_loss) is type(plain.recorder.smooth_loss)
    read = []
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda t: read.append(1) or t)
    def reads(*cbs):
        read.clear()
        digits(cbs=cbs).fit(1, 1e-3)
        return len(read)
    n = len(plain.dls.train)
    assert reads() > n > reads(gpu_step.DeviceLoss())

# --- one part after the other

STUBS = dict(fine="def fine(args, note): note('works', left=args.until)",
             bad="def bad(args, note): raise RuntimeError('no such kernel')",
             dies="import os\ndef dies(args, note): os._exit(7)",
             endless="import time\ndef endless(args, note):\n    note('begins')\n    time.sleep(600)")

@pytest.fixture
def stubs(tmp_path, monkeypatch):
    for name,code in STUBS.items(): (tmp_path/f'{name}.py').write_text(code)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    return tmp_path

def test_a_part_that_fails_does_not_stop_the_rest(stubs):
    args = arguments(stubs/'out', '--limit=60', f'--home={stubs/"home"}')
    gpu.run_parts(args, ['bad','dies','fine'])
    bad,dies,fine = gpu.lines(args.out)
    assert bad['error'] == 'RuntimeError: no such kernel' and 'bad.py' in bad['trace']
    assert dies['error'] == 'ended by 7' and fine['what'] == 'works'
    assert all(o['machine']['device'] == 'cpu' and o['machine']['python'] for o in (bad,dies,fine))
    assert [o.name for o in (stubs/'home').iterdir()] == ['gpu.tar.00']

def test_the_time_limit(stubs):
    args = arguments(stubs/'out', '--limit=4')
    gpu.run_parts(args, ['endless','fine'])
    begins,stopped,fine = gpu.lines(args.out)
    assert begins['what'] == 'begins' and stopped['error'] == 'stopped at its time limit' and fine['what'] == 'works'
    gpu.run_parts(arguments(stubs/'late', '--limit=0'), ['fine'])
    assert gpu.lines(stubs/'late')[0]['error'] == 'no time was left'

def test_command_line(capsys, tmp_path, monkeypatch):
    with pytest.raises(SystemExit): gpu.main(['cheque'])
    assert "part 'cheque' is unknown" in capsys.readouterr().err
    with pytest.raises(SystemExit): gpu.main(['--limit=0'])
    assert '--limit=0 must be at least 1' in capsys.readouterr().err
    monkeypatch.setattr(gpu, 'run_parts', lambda args, parts: seen.append(parts))
    seen = []
    gpu.main([f'--out={tmp_path}'])
    assert seen == [['check','step','everyday','protocol','mnist','loader']]

# --- what travels

def test_home(tmp_path):
    out = tmp_path/'out'
    for i in range(3):
        (out/f'run{i}').mkdir(parents=True)
        (out/f'run{i}'/'checkpoint.pth').write_bytes(os.urandom(4000))
        os.utime(out/f'run{i}'/'checkpoint.pth', (i,i))
    (out/'lines.jsonl').write_text('{}\n')
    gpu.pack_home(out, tmp_path/'home', most=9000, piece=10240)
    pieces = sorted((tmp_path/'home').iterdir())
    with tarfile.open(fileobj=BytesIO(b''.join(o.read_bytes() for o in pieces))) as tar: names = tar.getnames()
    assert names == ['lines.jsonl','run2/checkpoint.pth','run1/checkpoint.pth'] # the newest, as there is room for two
    assert len(pieces) == 2 and all(o.stat().st_size <= 10240 for o in pieces)

def test_pack(capsys, tmp_path):
    gpu.main(['pack','--dry',f'--path={tmp_path}'])
    said = capsys.readouterr().out
    assert 'wheel fastai>=2.8.12,<2.9' in said and 'cifar10.tgz (missing)' in said
    def wheel(name, *needs):
        with zipfile.ZipFile(tmp_path/f'{name}-1-py3-none-any.whl', 'w') as z:
            meta = [f'Name: {name}', *(f'Requires-Dist: {o}' for o in needs)]
            z.writestr(f'{name}-1.dist-info/METADATA', '\n'.join(meta))
        return tmp_path/f'{name}-1-py3-none-any.whl'
    wheels = [wheel('a', 'b>=1', 'torch', 'not_there', 'spacy', 'never; python_version<"3.8"'), wheel('b')]
    assert gpu_pack.missing(wheels) == ['not-there']

def test_everything_is_named():
    "The requirements of the library are there or travel"
    settings = ConfigParser()
    settings.read(ROOT/'settings.ini')
    def names(wanted): return {gpu_pack.norm(re.split('[<>=]', o)[0]) for o in wanted}
    assert names(settings['DEFAULT']['requirements'].split()) <= gpu_pack.there() | names(gpu_pack.WHEELS)
