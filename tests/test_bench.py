import importlib.util, json, os, subprocess, sys, numpy as np, pandas as pd, pytest, torch
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from fastai_jocor.lab import config, grid as grid_room, run as run_room
from fastai_jocor.lab.grid import GridProgress, check_grid, compare, finished, holder, run_dir, run_grid
from fastai_jocor.lab.config import Method, RunConfig, methods, read_grid
from fastai_jocor.lab.run import PaperSchedule, run, summarise
from fastai_jocor.lab.commands import jocor_bench
from fastai_jocor.callback import JoCorCallback

SCRIPTS = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parent.parent

def script(name, *args):
    env = {**os.environ, 'PYTHONWARNINGS': 'ignore', 'MPLBACKEND': 'agg'}
    return subprocess.run([SCRIPTS/name, *map(str,args)], capture_output=True, text=True, env=env)

def test_train_command(tmp_path):
    out = tmp_path/'run'
    p = script('jocor_train', '--epochs', 3, '--k', 3, '--noise', 'symmetric:0.4', '--out', out, '--threads', 1)
    assert p.returncode == 0, p.stderr
    lines = p.stdout.splitlines()
    assert lines[0].split()[:4] == ['epoch','train_loss','valid_loss','accuracy'] and 'label_precision' in lines[0]
    assert [l.split()[0] for l in lines[1:4]] == ['0','1','2'] and 'jocor k=3 on digits' in p.stdout
    h = pd.read_csv(out/'history.csv')
    assert len(h) == 3 and h.forget_rate.iloc[-1] == pytest.approx(.4) and {'peer_0','peer_1','peer_2'} <= set(h)
    np.testing.assert_allclose(h[['peer_0','peer_1','peer_2']].mean(axis=1), h.peer_accuracy, rtol=1e-4)
    assert json.loads((out/'config.json').read_text())['noise'] == 'symmetric:0.4'
    assert (out/'learning_curve.png').stat().st_size > 5000
    assert sum(v.numel() for v in torch.load(out/'model.pth', weights_only=True).values()) == 3*(64*256+256+2560+10)
    assert json.loads((out/'result.json').read_text())['ensemble_accuracy'] == pytest.approx(h.accuracy.mean(), abs=1e-5)

@pytest.mark.parametrize('args,msg', [(('--k',0),'k=0'), (('--noise','gauss:.1'),"noise='gauss:.1'"), (('--noise','symmetric:1.5'),'rate=1.5'), (('--noise','human:worse:none.pt'),'does not exist'), (('--subset',.5),'subset=0.5'), (('--contrast','js'),"contrast='js'"), (('--co_lambda',2),'co_lambda=2'),
    (('--forget_rate',1.),'forget_rate=1.0'), (('--num_gradual',-1),'num_gradual=-1'), (('--dataset','svhn'),"dataset='svhn'"), (('--epochs',0),'epochs=0'), (('--dataset','mnist','--path','/nowhere'),'no MNIST found')])
def test_train_command_refuses(args, msg, tmp_path):
    from fastai_jocor.lab.commands import jocor_train
    kw = {k.lstrip('-'): v for k,v in zip(args[::2], args[1::2])}
    with pytest.raises(SystemExit) as e: jocor_train(**kw, out=str(tmp_path/'x'))
    assert msg in str(e.value) and not (tmp_path/'x').exists()

@pytest.mark.parametrize('noise', ('none','symmetric:.3','pairflip:.3','asymmetric:.3','instance:.3','symmetric:.3:exact'))
def test_every_noise_on_digits(noise):
    assert run(RunConfig(noise=noise, epochs=1), verbose=False)[2]['epochs'] == 1

def test_reduced_precision_is_a_field_of_its_own(tmp_path):
    cfg = RunConfig(epochs=3, precision='bfloat16')
    seen = []
    class Look(run_room.Callback):
        def after_pred(self): seen.append(self.learn.pred.dtype)
    learn = run_room.run_learner(cfg)
    learn.add_cb(Look())
    with learn.no_logging(), learn.no_bar(): learn.fit(1)
    assert set(seen) == {torch.bfloat16}
    low,full = (run(RunConfig(epochs=3, precision=o), tmp_path/o, verbose=False)[1] for o in ('bfloat16','float32'))
    assert len(low) == 3 and abs(low.train_loss-full.train_loss).max() > 0 and low.accuracy.iloc[-1] > .3
    assert run_dir('', cfg) != run_dir('', RunConfig(epochs=3)) and finished(tmp_path/'bfloat16', cfg) and not finished(tmp_path/'float32', cfg)
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"): RunConfig(precision='bfloat')

def test_output_is_checked_before_training(tmp_path):
    from fastai_jocor.lab.commands import jocor_train
    (tmp_path/'file').write_text('')
    with pytest.raises(SystemExit): jocor_train(out=str(tmp_path/'file'), epochs=10**6)

def test_an_interrupted_run_keeps_its_history(tmp_path, monkeypatch):
    class Stop(PaperSchedule):
        def before_train(self):
            if self.epoch == 2: raise KeyboardInterrupt
    monkeypatch.setattr(run_room, 'PaperSchedule', Stop)
    with pytest.raises(KeyboardInterrupt): run(RunConfig(epochs=5), tmp_path, verbose=False)
    assert len(pd.read_csv(tmp_path/'history.csv')) == 2 and not (tmp_path/'result.json').exists()

def test_demo_command(tmp_path):
    p = script('jocor_demo', '--out', tmp_path, '--epochs', 4, '--seeds', 2, '--n-jobs', 2)
    assert p.returncode == 0, p.stderr
    table = pd.read_csv(tmp_path/'demo.csv', index_col=0)
    assert list(table.index) == ['standard','jocor k=2','jocor k=3'] and table.loc['standard','label precision'] == '–'
    assert '6/6' in p.stdout and '±' in p.stdout and (tmp_path/'demo.png').stat().st_size > 5000

def test_grid_resumes_and_does_not_depend_on_the_workers(tmp_path):
    cfgs = [RunConfig(epochs=2, k=k, seed=s) for k in (1,2) for s in (0,1)]
    a = run_grid(cfgs, tmp_path/'a', n_jobs=1)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path/'a').rglob('result.json')}
    assert len(times) == 4
    run_grid(cfgs, tmp_path/'a', n_jobs=1)
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path/'a').rglob('result.json')}
    b = run_grid(cfgs[::-1], tmp_path/'b', n_jobs=2)[::-1].reset_index(drop=True)
    cols = ['k','seed','ensemble_accuracy','peer_accuracy','label_precision']
    pd.testing.assert_frame_equal(a[cols], b[cols])

def test_a_result_of_another_configuration_does_not_count(tmp_path):
    cfg = RunConfig(epochs=2)
    run(cfg, tmp_path, verbose=False, extras=False)
    assert finished(tmp_path, cfg) and not finished(tmp_path, RunConfig(epochs=3)) and not finished(tmp_path/'none', cfg)
    (tmp_path/'result.json').write_text('{"half')
    assert finished(tmp_path, cfg) is None

def test_paper_schedule():
    from fastai_jocor.lab.run import run_learner
    from fastai.vision.all import Callback, ProgressCallback
    seen = []
    class See(Callback):
        def before_batch(self):
            if self.training and self.iter==0: g = self.opt.opt.param_groups[0]; seen.append((g['lr'], g['betas']))
    learn = run_learner(RunConfig(epochs=10))
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(10, 1e-3, cbs=[PaperSchedule(1e-3), See()])
    lrs,betas = zip(*seen)
    np.testing.assert_allclose(lrs, [1e-3]*5 + [1e-3*(10-e)/6 for e in range(5,10)])
    assert betas == ((.9,.999),)*4 + ((.1,.999),)*6

def test_summary_keeps_last_epochs_and_best_epoch_apart():
    h = pd.DataFrame(dict(accuracy=[.5,.9]+[.7]*10, peer_accuracy=[.4]*12))
    s = summarise(h)
    assert (s['ensemble_accuracy'], s['best_accuracy'], s['best_epoch'], s['peer_accuracy']) == (pytest.approx(.7), .9, 1, pytest.approx(.4))

def test_cifar_by_name(tmp_path):
    from image_files import make_cifar
    from fastai_jocor.noise import cifar10_classes
    make_cifar(tmp_path/'cifar10', cifar10_classes, 6, 6)
    p = script('jocor_train', '--dataset', 'cifar10', '--path', tmp_path, '--noise', 'instance:0.3', '--subset', 40, '--augment', 'crop_flip', '--epochs', 2, '--bs', 20, '--out', tmp_path/'run', '--threads', 1)
    assert p.returncode == 0, p.stderr
    res = json.loads((tmp_path/'run'/'result.json').read_text())
    assert res['config']['noise'] == 'instance:0.3' and res['config']['subset'] == 40 and 'noise instance:0.3' in p.stdout
    learn = run_room.run_learner(RunConfig('cifar10', noise='symmetric:0.2', bs=20), tmp_path)
    with learn.no_logging(), learn.no_bar(): learn.fit(1, cbs=JoCorCallback(k=2))
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in learn.model.parameters() if p.ndim == 4) # the faster layout on a CPU
    assert run_dir(tmp_path, RunConfig('cifar10', noise='symmetric:0.2', subset=40)).name.startswith('cifar10-symmetric0.2-jocor_k2-subset40')

def bench_script(*args):
    p = subprocess.run([sys.executable,'-W','ignore',str(Path(__file__).parent/'bench_script.py'),*map(str,args)], capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-3000:]
    return json.loads(p.stdout.splitlines()[-1])

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_killed_runs_go_on_bit_for_bit(tmp_path):
    for name,o in bench_script('kill', tmp_path).items():
        whole,cut,kills = o['whole'],o['cut'],o['kills']
        assert [k['checkpoint'] for k in kills] == sorted({k['checkpoint'] for k in kills}) and kills[0]['checkpoint'] >= 0
        assert [int(s) for s in o['starts']] == [0, *(k['checkpoint']+1 for k in kills)], name
        assert all('checkpoint.pth' in k['files'] and 'lock' in k['files'] and not k['finished'] for k in kills)
        assert whole['history'] == cut['history'] and len(whole['history'].splitlines()) == 41
        same = lambda r: {k: v for k,v in r.items() if k != 'seconds'}
        assert same(whole['result']) == same(cut['result']) and cut['result']['seconds'] > .03*40
        assert o['files'] == ['config.json','history.csv','result.json','starts']

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_two_processes_do_each_run_once(tmp_path):
    o = bench_script('two', tmp_path)
    assert sorted(l.split()[0] for l in o['started']) == list('01234') and len({l.split()[1] for l in o['started']}) == 2
    assert o['tables'][0] == o['tables'][1] and o['left'] == []

def half(d, name, text):
    d.mkdir(parents=True, exist_ok=True)
    (d/name).write_text(text)

def test_half_written_files_do_not_count(tmp_path):
    cfg = RunConfig(epochs=4)
    clean = run_grid([cfg], tmp_path/'a', n_jobs=1)
    d = run_dir(tmp_path/'b', cfg)
    whole = (run_dir(tmp_path/'a', cfg)/'result.json').read_text()
    half(d, 'history.csv', 'epoch,train_lo')
    half(d, 'result.json', whole[:len(whole)//2])
    half(d, 'result.json.123.tmp', whole)
    half(d, 'progress', 'x')
    half(d, 'checkpoint.pth', 'no checkpoint')
    assert finished(d, cfg) is None
    with pytest.warns(UserWarning, match='checkpoint.pth cannot be read'): again = run_grid([cfg], tmp_path/'b', n_jobs=1)
    half(tmp_path/'c', 'progress', '1')
    torch.save(dict(config=asdict(cfg), epoch=2), tmp_path/'c'/'checkpoint.pth')
    with pytest.warns(UserWarning, match='it lacks model, opt, parts'): short = run(cfg, tmp_path/'c', verbose=False, resume=True)[2]
    assert short['peer_accuracy'] == json.loads(whole)['peer_accuracy']
    pd.testing.assert_frame_equal(clean.drop(columns='seconds'), again.drop(columns='seconds'))
    assert not (d/'checkpoint.pth').exists() and not (d/'lock').exists()

def test_a_checkpoint_of_another_configuration_is_left_out(tmp_path, monkeypatch):
    class Stop(PaperSchedule):
        def before_train(self):
            super().before_train()
            if self.epoch == 3: raise KeyboardInterrupt
    a,b = RunConfig(method='standard', epochs=5, lr=1e-2),RunConfig(method='standard', epochs=5)
    with monkeypatch.context() as m:
        m.setattr(run_room, 'PaperSchedule', Stop)
        with pytest.raises(KeyboardInterrupt): run(a, tmp_path/'x', verbose=False, extras=False, resume=True)
    other = (tmp_path/'x'/'checkpoint.pth').read_bytes()
    half(tmp_path/'y', 'progress', '3')
    (tmp_path/'y'/'checkpoint.pth').write_bytes(other)
    for cfg,d in ((a,'x'),(b,'y')):
        pd.testing.assert_frame_equal(run(cfg, tmp_path/d, verbose=False, extras=False, resume=True)[1], run(cfg, verbose=False)[1])

def test_locks(tmp_path):
    from filelock import SoftFileLock
    cfg = RunConfig(epochs=1)
    d = run_dir(tmp_path, cfg)
    d.mkdir()
    with SoftFileLock(d/'lock'):
        assert grid_room._run_cell(cfg, methods['jocor'], tmp_path, None) is None and finished(d, cfg) is None
        assert holder(d).startswith(f'process {os.getpid()} on ')
        record = (d/'lock').read_text().splitlines()
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    half(d, 'lock', f'{dead.pid}\n{record[1]}\n')
    assert grid_room._run_cell(cfg, methods['jocor'], tmp_path, None) is None and finished(d, cfg) and holder(d) is None

def test_a_failed_run_does_not_stop_the_others(tmp_path, monkeypatch):
    cfgs,whole = [RunConfig(epochs=1, seed=s) for s in range(3)],grid_room.run
    def broken(cfg, *args, **kw):
        if cfg.seed == 1: raise ZeroDivisionError('no way')
        return whole(cfg, *args, **kw)
    monkeypatch.setattr(grid_room, 'run', broken)
    with pytest.raises(RuntimeError, match='1 of 3 runs failed(.|\n)*seed1: ZeroDivisionError: no way'): run_grid(cfgs, tmp_path, n_jobs=1)
    assert [bool(finished(run_dir(tmp_path, c), c)) for c in cfgs] == [True,False,True]

def test_committed_results_still_count(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    labels = np.repeat(range(10), 5000)
    torch.save(dict(clean_label=labels, worse_label=labels[::-1].copy()), 'CIFAR-10_human.pt')
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    monkeypatch.setattr(config, 'methods', dict(methods))
    monkeypatch.setitem(config.methods, 'use_rejected', importlib.import_module('rejected').methods['use_rejected'])
    files = sorted((ROOT/'benchmarks'/'results').rglob('result.json'))
    assert len(files) > 100
    for f in files:
        c = json.loads(f.read_text())['config']
        cfg = RunConfig(**c)
        assert run_dir(f.parent.parent, cfg) == f.parent and finished(f.parent, cfg)
        assert not finished(f.parent, RunConfig(**c | dict(epochs=c['epochs']+1)))

def test_grids_of_the_project():
    cfgs = read_grid(ROOT/'benchmarks'/'digits.yaml')
    assert len(cfgs) == 720 and len(check_grid(cfgs, 'x')) == 720 and [c.seed for c in cfgs] == sorted(c.seed for c in cfgs)
    assert {c.name for c in cfgs} >= {'standard','co_teaching k=2','co_teaching_plus k=2','forward','sce','jocor k=1','jocor k=2','jocor k=3','jocor k=3 kl_circular','jocor k=5 ce_circular'}
    cfgs = read_grid(ROOT/'benchmarks'/'mnist_protocol.yaml')
    assert [c.seed for c in cfgs] == sorted(c.seed for c in cfgs) and {c.noise for c in cfgs[:24]} == {'symmetric:0.2','symmetric:0.5','symmetric:0.8','asymmetric:0.4'}
    assert all((c.dataset,c.epochs,c.bs,c.lr,c.schedule) == ('mnist',200,128,1e-3,'paper') for c in cfgs)

@pytest.mark.parametrize('text,msg', [
    ('k: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{tmp}/touched]]', 'tag'), ('k: !!int 2','tag'), ('k: [2, 3','is no YAML'), ('- k: 2','must map names'), ('k: 2\nk: 3',"'k' stands there twice"),
    ('methd: jocor',"did you mean 'method'"), ('method: jocr',"did you mean 'jocor'"), ('runs: [{contrst: kl}]',"did you mean 'contrast'"), ('runs: {k: 2}','runs='), ('runs: []','runs=[]'), ('k: []','k=[]'), ('k: [2, two]',"k='two'"),
    ('k: yes','k=True'), ('k: 2.0','k=2.0'), ('k: 0','k=0'), ('seed: [0, x]',"seed='x'"), ('seed: 3-1',"seed='3-1'"), ('lr: .nan','lr=nan'), ('lr: 0','lr=0.0'), ('noise: 0.5','noise=0.5'), ('noise: symmetric:2','rate=2.0'), ('method: null','method=None'),
    ('dataset: digts',"did you mean 'digits'"), ('schedule: papr',"did you mean 'paper'"), ('options: {restat: true}',"did you mean 'restart'"), ('options: 3','options=3'), ('options: {init: tail}',"init='tail'"), ('{method: standard, options: {k: 1}}','takes none'), ('{method: forward, noise: none}',"noise='none' has none"), ('{method: co_teaching, k: 1}','k=1'), ('dataset: mnist','no MNIST found'), ('dataset: cifar10','cifar10')])
def test_bench_refuses_before_anything_starts(text, msg, tmp_path):
    (tmp_path/'grid.yaml').write_text(text.replace('{tmp}', str(tmp_path)))
    with pytest.raises(SystemExit) as e: jocor_bench(str(tmp_path/'grid.yaml'), str(tmp_path/'out'), path=str(tmp_path/'nowhere'))
    assert msg in str(e.value) and [p.name for p in tmp_path.iterdir()] == ['grid.yaml']

def test_bench_refuses_other_arguments(tmp_path):
    for kw,msg in ((dict(grid=str(tmp_path/'none.yaml')),'none.yaml'), (dict(k='1,x'),"k='x'"), (dict(k='!!int 1'),'tag'), (dict(backend='rya'),"did you mean 'ray'")):
        with pytest.raises(SystemExit) as e: jocor_bench(**kw, out=str(tmp_path/'out'))
        assert msg in str(e.value) and not (tmp_path/'out').exists()
    if not importlib.util.find_spec('ray'):
        with pytest.raises(SystemExit, match='fastai_jocor.ray.'): jocor_bench(backend='ray', out=str(tmp_path/'out'))

def test_a_method_is_chosen_among_the_runs_of_a_grid():
    names = lambda file, **over: [(c.seed,c.noise,c.name,c.co_lambda) for c in read_grid(ROOT/'benchmarks'/file, **over)]
    for file in ('mnist_protocol.yaml','digits.yaml'):
        every = names(file)
        for m in ('standard','jocor','co_teaching'): assert names(file, method=m) == [o for o in every if o[2].split()[0] == m]
    with pytest.raises(ValueError, match="method='sce' is in none of the runs of the grid, which are of standard, jocor, co_teaching, co_teaching_plus"): read_grid(ROOT/'benchmarks'/'mnist_protocol.yaml', method='sce')
    with pytest.raises(ValueError, match="mnist_protocol.yaml: method='jocr' is unknown: did you mean 'jocor'"): read_grid(ROOT/'benchmarks'/'mnist_protocol.yaml', method='jocr')
    with pytest.raises(ValueError, match="^seed='3-1'"): read_grid(None, seed='3-1')

def test_a_new_run_leaves_nothing_of_the_old_one(tmp_path, monkeypatch):
    class Stop(PaperSchedule):
        def before_train(self):
            super().before_train()
            if self.epoch == 1: raise KeyboardInterrupt
    old = RunConfig(method='standard', epochs=2)
    run(old, tmp_path/'r', verbose=False)
    assert finished(tmp_path/'r', old) and (tmp_path/'r'/'model.pth').exists()
    monkeypatch.setattr(run_room, 'PaperSchedule', Stop)
    with pytest.raises(KeyboardInterrupt): run(RunConfig(method='standard', epochs=3, noise='none'), tmp_path/'r', verbose=False)
    assert sorted(p.name for p in (tmp_path/'r').iterdir()) == ['config.json','history.csv'] and finished(tmp_path/'r', old) is None
    assert len(pd.read_csv(tmp_path/'r'/'history.csv')) == 1

def test_names_that_are_long_or_hold_mathematics(tmp_path):
    cfg = RunConfig(epochs=1, options=dict(models=tuple(range(100))))
    assert len(run_dir(tmp_path, cfg).name) <= 200 and run_dir(tmp_path, cfg) != run_dir(tmp_path, RunConfig(epochs=1, options=dict(models=list(range(101)))))
    df = run_grid([cfg, RunConfig(epochs=1, seed=np.int64(1))], tmp_path, n_jobs=1)
    assert list(df.seed) == [0,1] and finished(run_dir(tmp_path, cfg), cfg)
    run_room.plot_history(pd.read_csv(run_dir(tmp_path, cfg)/'history.csv'), SimpleNamespace(name='jocor', dataset='cifar10', noise='human:worse:$a^$/x.pt')).savefig(tmp_path/'x.png')

def test_workers_use_the_method_as_it_is_now(tmp_path, monkeypatch):
    old = Method(JoCorCallback)
    monkeypatch.setitem(methods, 'mine', old)
    cfg,seen = RunConfig(method='mine', epochs=1),[]
    monkeypatch.setattr(grid_room, 'run', lambda cfg, *a, **k: seen.append(methods['mine']))
    new = Method(JoCorCallback)
    for i,m in enumerate((old,new)): assert 'does not come back' in grid_room._run_cell(cfg, m, tmp_path/str(i), None)
    assert seen[0] is old and seen[1] is new

def test_compare_keeps_apart_what_is_not_a_seed():
    row = lambda noise, seed, acc: dict(name='jocor k=2', noise=noise, seed=seed, ensemble_accuracy=acc, peer_accuracy=acc, best_accuracy=acc, co_lambda=.8)
    one = compare(pd.DataFrame([row('none',0,.9), row('none',1,.8)]))
    assert list(one.index) == ['jocor k=2'] and one.index.name == 'method' and one['test accuracy'].item() == '85.00 ± 7.07'
    two = compare(pd.DataFrame([row('none',0,.9), row('none',1,.8), row('symmetric:0.8',0,.4), row('symmetric:0.8',1,.4)]))
    assert list(two.index) == [('jocor k=2','none'),('jocor k=2','symmetric:0.8')] and list(two['single peers']) == ['85.00 ± 7.07','40.00 ± 0.00'] and two.index.names == ['method','noise']

def test_two_runs_never_share_a_folder(tmp_path):
    files = []
    for n in 'ab':
        files.append(tmp_path/n/'labels.pt'); files[-1].parent.mkdir()
        torch.save(dict(worse_label=np.zeros(5, dtype=int), clean_label=np.zeros(5, dtype=int)), files[-1])
    with pytest.raises(ValueError, match='share the folder'): check_grid([RunConfig('cifar10', noise=f'human:worse:{f}') for f in files], tmp_path)

def test_grid_from_lists_and_file(tmp_path):
    (tmp_path/'g.yaml').write_text('epochs: 2\nlr: 1e-2\nseed: [0-1, 5]\nruns:\n  - method: standard\n  - {k: [2, 3]}\n')
    cfgs = read_grid(tmp_path/'g.yaml')
    assert [(c.seed,c.name) for c in cfgs] == [(s,n) for s in (0,1,5) for n in ('standard','jocor k=2','jocor k=3')] and {c.lr for c in cfgs} == {1e-2}
    assert [(c.seed,c.noise,c.name) for c in read_grid(tmp_path/'g.yaml', seed='7', noise='none, pairflip:0.2', method='jocor', k='2')] == [(7,'none','jocor k=2'), (7,'pairflip:0.2','jocor k=2')]
    p = script('jocor_bench', tmp_path/'g.yaml', '--out', tmp_path/'r', '--seed', '0', '--n-jobs', 1)
    assert p.returncode == 0 and '3/3 runs, 100%' in p.stdout and '\r' not in p.stdout, p.stderr
    p = script('jocor_bench', tmp_path/'g.yaml', '--out', tmp_path/'r', '--dry-run')
    assert [l.split()[0] for l in p.stdout.splitlines()] == ['done']*3 + ['open']*6

class Timid(JoCorCallback):
    "Keep a little more than JoCoR does"
    def __init__(self, k:int=2, forget_rate:float=None, shy:float=.5, **kwargs):
        super().__init__(k, forget_rate=forget_rate, **kwargs)
        self.shy = shy
    def keep_small(self, losses, rate): return super().keep_small(losses, rate*self.shy)

def test_a_method_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(methods, 'timid', Method(Timid))
    cfg = RunConfig(method='timid', k=3, epochs=3, options=dict(shy=.25, num_gradual=1))
    assert cfg.name == 'timid k=3 num_gradual=1 shy=0.25' and run_dir('', cfg).name == 'digits-symmetric0.5-timid_k3_num_gradual1_shy0.25-epochs3-seed0'
    with pytest.raises(ValueError, match="did you mean 'shy'"): RunConfig(method='timid', options=dict(shi=1))
    assert RunConfig(method='timid', contrast='ce', options=dict(shy=.5)).plain() == RunConfig(method='timid').plain()
    df = run_grid([cfg, RunConfig(method='timid', k=3, epochs=3)], tmp_path, n_jobs=2)
    h = [pd.read_csv(p/'history.csv') for p in (run_dir(tmp_path, cfg), run_dir(tmp_path, RunConfig(method='timid', k=3, epochs=3)))]
    assert h[0].kept.iloc[-1] == pytest.approx(1-.5*.25, abs=.01) and h[1].kept.iloc[-1] == pytest.approx(1-.5*.5, abs=.01) and 'peer_2' in h[0]

def test_a_loss_as_a_method(tmp_path, monkeypatch):
    seen = []
    class Counting(torch.nn.CrossEntropyLoss):
        def __init__(self, dls, label_smoothing=0.):
            super().__init__(label_smoothing=label_smoothing)
            seen.append(dls.noise.noise_rate)
            self.register_buffer('calls', torch.zeros((), dtype=torch.long))
        def forward(self, z, y):
            self.calls += 1
            return super().forward(z, y)*(1+self.calls/1000)
    monkeypatch.setitem(methods, 'counting', Method(loss=Counting))
    cfg = RunConfig(method='counting', epochs=6, options=dict(label_smoothing=.1))
    learn,whole,_ = run(cfg, verbose=False)
    assert isinstance(learn.loss_func, Counting) and learn.loss_func.label_smoothing == .1 and seen == [.5] and cfg.nets == 1
    class Stop(PaperSchedule):
        def before_train(self):
            super().before_train()
            if self.epoch == 3: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(run_room, 'PaperSchedule', Stop)
        with pytest.raises(KeyboardInterrupt): run(cfg, tmp_path, verbose=False, extras=False, resume=True)
    pd.testing.assert_frame_equal(run(cfg, tmp_path, verbose=False, extras=False, resume=True)[1], whole)

@pytest.mark.parametrize('method', ('co_teaching','co_teaching_plus','forward','sce'))
def test_every_method_goes_on_from_its_checkpoint(method, tmp_path, monkeypatch):
    class Stop(PaperSchedule):
        def before_train(self):
            super().before_train()
            if self.epoch == 4: raise KeyboardInterrupt
    cfg = RunConfig(method=method, epochs=6)
    with monkeypatch.context() as m:
        m.setattr(run_room, 'PaperSchedule', Stop)
        with pytest.raises(KeyboardInterrupt): run(cfg, tmp_path, verbose=False, extras=False, resume=True)
    assert torch.load(tmp_path/'checkpoint.pth', weights_only=True)['epoch'] == 3
    pd.testing.assert_frame_equal(run(cfg, tmp_path, verbose=False, extras=False, resume=True)[1], run(cfg, verbose=False)[1])

def test_a_run_leaves_nothing_in_memory(tmp_path, monkeypatch):
    "A learner holds its data in a circle of references, so that a worker that does many runs would fill up"
    import weakref
    learners,make = [],run_room.run_learner
    monkeypatch.setattr(run_room, 'run_learner', lambda *args: (learn := make(*args), learners.append(weakref.ref(learn)))[0])
    assert grid_room._run_cell(RunConfig(epochs=1), methods['jocor'], tmp_path, None) is None
    assert len(learners) == 1 and learners[0]() is None

def test_progress_line(tmp_path):
    import io
    cfgs = [RunConfig(epochs=2, k=k) for k in (1,3)]
    cells = check_grid(cfgs, tmp_path)
    term,plain = io.StringIO(),io.StringIO()
    term.isatty = lambda: True
    with GridProgress(cells, term) as p, GridProgress(cells, plain):
        half(run_dir(tmp_path, cfgs[1]), 'progress', '1')
        assert p.share() == pytest.approx(3/8) and p.line().startswith('0/2 runs, 38%') and p.line().endswith(' to go')
        run(cfgs[0], run_dir(tmp_path, cfgs[0]), verbose=False, extras=False)
    assert term.getvalue().count('\n') == 1 and '\r1/2 runs' in term.getvalue()
    assert [l.split()[0] for l in plain.getvalue().splitlines()] == ['1/2']

def test_committed_digits_come_out_again(tmp_path):
    out = ROOT/'benchmarks'/'results'/'digits_grid'
    cfgs = [c for c in read_grid(ROOT/'benchmarks'/'digits.yaml', seed='0', noise='symmetric:0.5') if c.name in ('standard','jocor k=2','jocor k=2 balance=0.5')]
    assert len(cfgs) == 3
    for cfg in cfgs:
        committed = finished(run_dir(out, cfg), cfg)
        df = run_grid([cfg], tmp_path, n_jobs=1)
        old,new = [pd.read_csv(run_dir(p, cfg)/'history.csv') for p in (out,tmp_path)]
        assert list(old) == list(new)
        np.testing.assert_allclose(new.train_loss[:3], old.train_loss[:3], rtol=1e-3)
        np.testing.assert_allclose(new.accuracy[:3], old.accuracy[:3], atol=.01)
        for c in ('peer_accuracy','ensemble_accuracy'): assert df[c][0] == pytest.approx(committed[c], abs=.03), c

def test_ray(tmp_path):
    ray = pytest.importorskip('ray')
    cfgs = [RunConfig(epochs=2, k=k) for k in (1,2)]
    try: a = run_grid(cfgs, tmp_path/'a', n_jobs=2, backend='ray')
    finally: ray.shutdown()
    pd.testing.assert_frame_equal(a.drop(columns='seconds'), run_grid(cfgs, tmp_path/'b', n_jobs=1).drop(columns='seconds'))
