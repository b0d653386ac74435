import json, os, subprocess, sys, numpy as np, pandas as pd, pytest, torch
from pathlib import Path
from fastai_jocor.bench import PaperSchedule, RunConfig, finished, plot_history, run, run_dir, run_grid, summarise

SCRIPTS = Path(sys.executable).parent

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
    from fastai_jocor.bench import jocor_train
    kw = {k.lstrip('-'): v for k,v in zip(args[::2], args[1::2])}
    with pytest.raises(SystemExit) as e: jocor_train(**kw, out=str(tmp_path/'x'))
    assert msg in str(e.value) and not (tmp_path/'x').exists()

@pytest.mark.parametrize('noise', ('none','symmetric:.3','pairflip:.3','asymmetric:.3','instance:.3','symmetric:.3:exact'))
def test_every_noise_on_digits(noise):
    assert run(RunConfig(noise=noise, epochs=1), verbose=False)[2]['epochs'] == 1

def test_output_is_checked_before_training(tmp_path):
    from fastai_jocor.bench import jocor_train
    (tmp_path/'file').write_text('')
    with pytest.raises(SystemExit): jocor_train(out=str(tmp_path/'file'), epochs=10**6)

def test_an_interrupted_run_keeps_its_history(tmp_path, monkeypatch):
    from fastai_jocor import bench
    class Stop(bench.PaperSchedule):
        def before_train(self):
            if self.epoch == 2: raise KeyboardInterrupt
    monkeypatch.setattr(bench, 'PaperSchedule', Stop)
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
    from fastai_jocor.bench import run_learner
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
    from test_data import make_cifar
    from fastai_jocor.noise import cifar10_classes
    make_cifar(tmp_path/'cifar10', cifar10_classes, 6, 6)
    p = script('jocor_train', '--dataset', 'cifar10', '--path', tmp_path, '--noise', 'instance:0.3', '--subset', 40, '--augment', 'crop_flip', '--epochs', 2, '--bs', 20, '--out', tmp_path/'run', '--threads', 1)
    assert p.returncode == 0, p.stderr
    res = json.loads((tmp_path/'run'/'result.json').read_text())
    assert res['config']['noise'] == 'instance:0.3' and res['config']['subset'] == 40 and 'noise instance:0.3' in p.stdout
    assert run_dir(tmp_path, RunConfig('cifar10', noise='symmetric:0.2', subset=40)).name.startswith('cifar10-symmetric0.2-jocor_k2-subset40')
