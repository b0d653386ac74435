"Many runs: each done once, taken up where they were killed, and packed."
import importlib, io, json, os, subprocess, sys, time, weakref, numpy as np, pandas as pd, pytest, torch
from pathlib import Path
from types import SimpleNamespace
from fastai_jocor.callback import JoCorCallback
from fastai_jocor.losses import contrasts
from fastai_jocor.lab import grid as grid_room, run as run_room
from fastai_jocor.lab.config import Method, RunConfig, methods
from fastai_jocor.lab.grid import GridProgress, check_grid, holder, run_grid
from fastai_jocor.lab.results import finished, pack, read_runs, run_dir
from fastai_jocor.lab.run import run
from fastai_jocor.lab.spec import read_grid
from lab_helpers import RESULTS, ROOT, put

def test_grid_resumes_and_does_not_depend_on_the_workers(tmp_path):
    cfgs = [RunConfig(epochs=2, k=k, seed=s) for k in (1,2) for s in (0,1)]
    a = run_grid(cfgs, tmp_path/'a', n_jobs=1)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path/'a').rglob('result.json')}
    assert len(times) == 4
    run_grid(cfgs, tmp_path/'a', n_jobs=1)
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path/'a').rglob('result.json')}
    b = run_grid(cfgs[::-1], tmp_path/'b', n_jobs=2)[::-1].reset_index(drop=True)
    columns = ['k','seed','ensemble_accuracy','peer_accuracy','label_precision']
    pd.testing.assert_frame_equal(a[columns], b[columns])

def test_a_result_of_another_configuration_does_not_count(tmp_path):
    cfg = RunConfig(epochs=2)
    run(cfg, tmp_path, verbose=False, extras=False)
    assert finished(tmp_path, cfg)
    assert not finished(tmp_path, RunConfig(epochs=3)) and not finished(tmp_path/'none', cfg)
    (tmp_path/'result.json').write_text('{"half')
    assert finished(tmp_path, cfg) is None

def grid_script(*args):
    command = [sys.executable, '-W', 'ignore', str(Path(__file__).parent/'grid_script.py'), *map(str, args)]
    p = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-3000:]
    return json.loads(p.stdout.splitlines()[-1])

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_killed_runs_go_on_bit_for_bit(tmp_path):
    for name,o in grid_script('kill', tmp_path).items():
        whole,cut,kills = o['whole'],o['cut'],o['kills']
        at = [k['checkpoint'] for k in kills]
        assert 0 < at[0] < at[1] and [int(s) for s in o['starts']] == [0,*at], name
        assert all({'checkpoint.pth','lock'} <= set(k['files']) and not k['finished'] for k in kills)
        assert whole['history'] == cut['history'] and len(whole['history'].splitlines()) == 41
        same = lambda r: {k: v for k,v in r.items() if k != 'seconds'}
        assert same(whole['result']) == same(cut['result']) and cut['result']['seconds'] > .03*40
        assert o['files'] == ['config.json','history.csv','result.json','starts']

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_two_processes_do_each_run_once(tmp_path):
    o = grid_script('two', tmp_path)
    seeds,pids = zip(*(l.split() for l in o['started']))
    assert sorted(seeds) == list('01234') and len(set(pids)) == 2
    assert o['tables'][0] == o['tables'][1] and o['left'] == []

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
    put(d, 'lock', f'{dead.pid}\n{record[1]}\n')
    assert grid_room._run_cell(cfg, methods['jocor'], tmp_path, None) is None
    assert finished(d, cfg) and holder(d) is None

def test_runs_of_others_are_waited_for(tmp_path, monkeypatch, capsys):
    cfg = RunConfig(epochs=1)
    d = run_dir(tmp_path, cfg)
    put(d, 'lock', '7\nelsewhere\n')                       # a host that nobody can ask
    def seconds_pass(_):
        (d/'lock').unlink(missing_ok=True)
        run(cfg, d, verbose=False, extras=False)
    monkeypatch.setattr(grid_room, 'time', SimpleNamespace(perf_counter=time.perf_counter, sleep=seconds_pass))
    assert len(run_grid([cfg], tmp_path, n_jobs=1)) == 1
    assert 'waiting for 1 runs of process 7 on elsewhere' in capsys.readouterr().out

def test_a_failed_run_does_not_stop_the_others(tmp_path, monkeypatch):
    cfgs,whole = [RunConfig(epochs=1, seed=s) for s in range(3)],grid_room.run
    def broken(cfg, *args, **kw):
        if cfg.seed == 1: raise ZeroDivisionError('no way')
        return whole(cfg, *args, **kw)
    monkeypatch.setattr(grid_room, 'run', broken)
    with pytest.raises(RuntimeError, match='1 of 3 runs failed(.|\n)*seed1: ZeroDivisionError: no way'):
        run_grid(cfgs, tmp_path, n_jobs=1)
    assert [bool(finished(run_dir(tmp_path, c), c)) for c in cfgs] == [True,False,True]

def test_a_run_leaves_nothing_in_memory(tmp_path, monkeypatch):
    "A learner holds its data in a circle of references, so that a worker that does many runs would fill up"
    learners,make = [],run_room.run_learner
    def remembered(*args):
        learn = make(*args)
        learners.append(weakref.ref(learn))
        return learn
    monkeypatch.setattr(run_room, 'run_learner', remembered)
    assert grid_room._run_cell(RunConfig(epochs=1), methods['jocor'], tmp_path, None) is None
    assert len(learners) == 1 and learners[0]() is None

def test_workers_use_the_method_as_it_is_now(tmp_path, monkeypatch):
    old,new = Method(JoCorCallback),Method(JoCorCallback)
    monkeypatch.setitem(methods, 'mine', old)
    cfg,seen = RunConfig(method='mine', epochs=1),[]
    monkeypatch.setattr(grid_room, 'run', lambda cfg, *a, **k: seen.append(methods['mine']))
    for i,m in enumerate((old,new)): assert 'is read back' in grid_room._run_cell(cfg, m, tmp_path/str(i), None)
    assert seen[0] is old and seen[1] is new

class Timid(JoCorCallback):
    "Keep a little more than JoCoR does"
    def __init__(self, shy=.5, **kwargs):
        super().__init__(**kwargs)
        self.shy = shy
    def keep_small(self, losses, rate, by=None): return super().keep_small(losses, rate*self.shy, by)

def test_a_method_of_ones_own_goes_to_the_workers(tmp_path, monkeypatch):
    monkeypatch.setitem(methods, 'timid', Method(Timid))
    cfgs = [RunConfig(method='timid', k=3, epochs=3, num_gradual=1, options=dict(shy=o)) for o in (.25,.5)]
    run_grid(cfgs, tmp_path, n_jobs=2)
    for cfg in cfgs:
        h = read_runs(tmp_path)[run_dir(tmp_path, cfg).name][1]
        assert h.kept.iloc[-1] == pytest.approx(1-.5*cfg.options['shy'], abs=.01) and 'peer_2' in h

def test_a_contrast_of_ones_own_goes_to_the_workers(tmp_path, monkeypatch):
    monkeypatch.setitem(contrasts, 'none', lambda lp: 0*lp.sum((0,-1)))
    cfgs = [RunConfig(epochs=2, co_lambda=.5, contrast=o) for o in ('none','kl')]
    a,b =run_grid(cfgs, tmp_path, n_jobs=2).peer_accuracy
    assert a != b

def test_two_runs_never_share_a_folder(tmp_path):
    files = [tmp_path/n/'labels.pt' for n in 'ab']
    for f in files:
        f.parent.mkdir()
        torch.save(dict(worse_label=np.zeros(5, dtype=int), clean_label=np.zeros(5, dtype=int)), f)
    with pytest.raises(ValueError, match='share the folder'):
        check_grid([RunConfig('cifar10', noise=f'human:worse:{f}') for f in files], tmp_path)

def test_numbers_of_numpy_come_back(tmp_path):
    cfg = RunConfig(epochs=np.int64(1), seed=np.int64(1), co_lambda=np.float64(.5), options=dict(init='all'))
    assert list(run_grid([cfg], tmp_path, n_jobs=1).seed) == [1] and finished(run_dir(tmp_path, cfg), cfg)

def test_progress_line(tmp_path):
    cfgs = [RunConfig(epochs=2, k=k) for k in (1,3)]
    cells = check_grid(cfgs, tmp_path)
    term,plain = io.StringIO(),io.StringIO()
    term.isatty = lambda: True
    with GridProgress(cells, term) as p, GridProgress(cells, plain):
        put(run_dir(tmp_path, cfgs[1]), 'progress', '1')
        assert p.share() == pytest.approx(3/8) and p.line().startswith('0/2 runs, 38%') and p.line().endswith(' to go')
        run(cfgs[0], run_dir(tmp_path, cfgs[0]), verbose=False, extras=False)
    assert term.getvalue().count('\n') == 1 and '\r1/2 runs' in term.getvalue()
    assert [l.split()[0] for l in plain.getvalue().splitlines()] == ['1/2']

def test_ray(tmp_path):
    ray = pytest.importorskip('ray')
    cfgs = [RunConfig(epochs=2, k=k) for k in (1,2)]
    try: a = run_grid(cfgs, tmp_path/'a', n_jobs=2, backend='ray')
    finally: ray.shutdown()
    b = run_grid(cfgs, tmp_path/'b', n_jobs=1)
    pd.testing.assert_frame_equal(a.drop(columns='seconds'), b.drop(columns='seconds'))

# --- packed results

PACKED = ['histories.csv.gz','results.jsonl']

def test_packed_runs_are_not_done_again(tmp_path):
    cfgs = [RunConfig(method='standard', epochs=2, seed=s) for s in range(3)]
    first = run_grid(cfgs[:2], tmp_path, n_jobs=1)
    before = read_runs(tmp_path)
    assert pack(tmp_path) == 2 and sorted(p.name for p in tmp_path.iterdir()) == PACKED
    again = run_grid(cfgs, tmp_path, n_jobs=1)
    pd.testing.assert_frame_equal(again[:2], first)
    assert [run_dir(tmp_path, c).is_dir() for c in cfgs] == [False,False,True] and pack(tmp_path) == 3
    after = read_runs(tmp_path)
    for name,(res,h) in before.items():
        assert after[name][0] == res
        pd.testing.assert_frame_equal(after[name][1], h)

def test_packing_leaves_what_is_not_whole(tmp_path):
    cfg = RunConfig(method='standard', epochs=2)
    run(cfg, run_dir(tmp_path, cfg), verbose=False)
    put(tmp_path/'begun', 'config.json', '{}')
    put(tmp_path/'torn', 'result.json', '{"name"')
    put(tmp_path/'short', 'result.json', (run_dir(tmp_path, cfg)/'result.json').read_text())
    put(tmp_path/'short', 'history.csv', 'epoch,accuracy,peer_accuracy\n0,.5,.5\n')
    assert pack(tmp_path) == 1 and (tmp_path/'short'/'history.csv').exists()
    assert sorted(p.name for p in run_dir(tmp_path, cfg).iterdir()) == ['learning_curve.png','model.pth']
    assert (tmp_path/'begun'/'config.json').exists() and (tmp_path/'torn'/'result.json').exists()
    with pytest.raises(ValueError, match='holds no finished run'): pack(tmp_path/'torn')

def test_committed_results_still_count(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    labels = np.repeat(range(10), 5000)
    torch.save(dict(clean_label=labels, worse_label=labels[::-1].copy()), 'CIFAR-10_human.pt')
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    monkeypatch.setitem(methods, 'use_rejected', None)
    importlib.import_module('rejected')
    grids = sorted(f.parent for f in RESULTS.rglob('results.jsonl'))
    assert len(grids) > 5
    for grid in grids:
        for name,(res,h) in read_runs(grid).items():
            cfg = RunConfig(**res['config'])
            assert run_dir(grid, cfg) == grid/name and finished(grid/name, cfg) and len(h) == cfg.epochs
            assert not finished(grid/name, RunConfig(**res['config'] | dict(epochs=cfg.epochs+1)))

def test_committed_digits_come_out_again(tmp_path):
    out,wanted = RESULTS/'digits_grid',('standard','jocor k=2','jocor k=2 balance=0.5')
    every = read_grid('digits', seed='0', noise='symmetric:0.5')
    cfgs = [c for c in every if c.name in wanted]
    assert len(cfgs) == 3
    df,kept = run_grid(cfgs, tmp_path, n_jobs=1),read_runs(out)
    for i,cfg in enumerate(cfgs):
        name = run_dir(out, cfg).name
        (committed,old),new = kept[name],read_runs(tmp_path)[name][1]
        assert set(old)-{'non_finite'} == set(new) # a column that epoch tables no longer have
        np.testing.assert_allclose(new.train_loss[:3], old.train_loss[:3], rtol=1e-3)
        np.testing.assert_allclose(new.accuracy[:3], old.accuracy[:3], atol=.01)
        for c in ('peer_accuracy','ensemble_accuracy'): assert df[c][i] == pytest.approx(committed[c], abs=.03), c
