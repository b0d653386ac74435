"One run: what it writes, how it is interrupted and taken up."
import json, numpy as np, pandas as pd, pytest, torch
from types import SimpleNamespace
from fastai.vision.all import Callback, ProgressCallback
from fastai_jocor.callback import JoCorCallback
from fastai_jocor.lab.config import Method, RunConfig, methods
from fastai_jocor.lab.results import finished, run_dir
from fastai_jocor.lab.run import PaperSchedule, plot_history, run, run_learner, summarise
from lab_helpers import interrupt_at, put

NOISES = ('none','symmetric:.3','pairflip:.3','asymmetric:.3','instance:.3','symmetric:.3:exact')

@pytest.mark.parametrize('noise', NOISES)
def test_every_noise_on_digits(noise):
    assert run(RunConfig(noise=noise, epochs=1), verbose=False)[2]['epochs'] == 1

def test_reduced_precision_is_a_field_of_its_own(tmp_path):
    cfg,seen = RunConfig(epochs=3, precision='bfloat16'),[]
    class Look(Callback):
        def after_pred(self): seen.append(self.learn.pred.dtype)
    learn = run_learner(cfg)
    learn.add_cb(Look())
    with learn.no_logging(), learn.no_bar(): learn.fit(1)
    assert set(seen) == {torch.bfloat16}
    low,full = (run(RunConfig(epochs=3, precision=o), tmp_path/o, verbose=False)[1] for o in ('bfloat16','float32'))
    assert len(low) == 3 and abs(low.train_loss-full.train_loss).max() > 0 and low.accuracy.iloc[-1] > .3
    assert run_dir('', cfg) != run_dir('', RunConfig(epochs=3))
    assert finished(tmp_path/'bfloat16', cfg) and not finished(tmp_path/'float32', cfg)
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"): RunConfig(precision='bfloat')

def test_paper_schedule():
    seen = []
    class See(Callback):
        def before_batch(self):
            if not self.training or self.iter: return
            group = self.opt.opt.param_groups[0]
            seen.append((group['lr'], group['betas']))
    learn = run_learner(RunConfig(epochs=10))
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(10, 1e-3, cbs=[PaperSchedule(1e-3), See()])
    lrs,betas = zip(*seen)
    np.testing.assert_allclose(lrs, [1e-3]*5 + [1e-3*(10-e)/6 for e in range(5,10)])
    assert betas == ((.9,.999),)*4 + ((.1,.999),)*6

def test_summary_keeps_last_epochs_and_best_epoch_apart():
    s = summarise(pd.DataFrame(dict(accuracy=[.5,.9]+[.7]*10, peer_accuracy=[.4]*12)))
    assert (s['ensemble_accuracy'], s['peer_accuracy']) == (pytest.approx(.7), pytest.approx(.4))
    assert (s['best_accuracy'], s['best_epoch']) == (.9,1)

def test_an_interrupted_run_keeps_its_history(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt): run(RunConfig(epochs=5), tmp_path, verbose=False)
    assert len(pd.read_csv(tmp_path/'history.csv')) == 2 and not (tmp_path/'result.json').exists()

def test_a_new_run_leaves_nothing_of_the_old_one(tmp_path, monkeypatch):
    old = RunConfig(method='standard', epochs=2)
    run(old, tmp_path/'r', verbose=False)
    assert finished(tmp_path/'r', old) and (tmp_path/'r'/'model.pth').exists()
    interrupt_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        run(RunConfig(method='standard', epochs=3, noise='none'), tmp_path/'r', verbose=False)
    assert sorted(p.name for p in (tmp_path/'r').iterdir()) == ['config.json','history.csv']
    assert finished(tmp_path/'r', old) is None and len(pd.read_csv(tmp_path/'r'/'history.csv')) == 1

def test_half_written_files_do_not_count(tmp_path):
    cfg = RunConfig(epochs=4)
    clean = run(cfg, tmp_path/'a', verbose=False, extras=False)[1]
    whole = (tmp_path/'a'/'result.json').read_text()
    for name,text in (('history.csv','epoch,train_lo'), ('result.json',whole[:len(whole)//2]), ('progress','x'),
                      ('result.json.123.tmp',whole), ('checkpoint.pth','no checkpoint')): put(tmp_path/'b', name, text)
    assert finished(tmp_path/'b', cfg) is None
    with pytest.warns(UserWarning, match='checkpoint.pth cannot be read'):
        again = run(cfg, tmp_path/'b', verbose=False, extras=False, resume=True)[1]
    pd.testing.assert_frame_equal(clean, again)
    assert finished(tmp_path/'b', cfg) and not (tmp_path/'b'/'checkpoint.pth').exists()

def test_a_checkpoint_of_another_configuration_is_left_out(tmp_path, monkeypatch):
    a,b = RunConfig(method='standard', epochs=5, lr=1e-2),RunConfig(method='standard', epochs=5)
    with monkeypatch.context() as m:
        interrupt_at(m, 3)
        with pytest.raises(KeyboardInterrupt): run(a, tmp_path/'x', verbose=False, extras=False, resume=True)
    put(tmp_path/'y', 'progress', '3')
    (tmp_path/'y'/'checkpoint.pth').write_bytes((tmp_path/'x'/'checkpoint.pth').read_bytes())
    again = run(a, tmp_path/'x', verbose=False, extras=False, resume=True)[1]
    with pytest.warns(UserWarning, match='of another run'):
        other = run(b, tmp_path/'y', verbose=False, extras=False, resume=True)[1]
    for cfg,h in ((a,again),(b,other)): pd.testing.assert_frame_equal(h, run(cfg, verbose=False)[1])

@pytest.mark.parametrize('method', ('co_teaching','co_teaching_plus','forward','sce'))
def test_every_method_goes_on_from_its_checkpoint(method, tmp_path, monkeypatch):
    cfg = RunConfig(method=method, epochs=6)
    with monkeypatch.context() as m:
        interrupt_at(m, 4)
        with pytest.raises(KeyboardInterrupt): run(cfg, tmp_path, verbose=False, extras=False, resume=True)
    assert torch.load(tmp_path/'checkpoint.pth', weights_only=True)['epoch'] == 4
    again = run(cfg, tmp_path, verbose=False, extras=False, resume=True)[1]
    pd.testing.assert_frame_equal(again, run(cfg, verbose=False)[1])

class Counting(torch.nn.CrossEntropyLoss):
    "A loss that depends on how often it was called"
    def __init__(self, dls, label_smoothing=0.):
        super().__init__(label_smoothing=label_smoothing)
        self.rate = dls.noise.noise_rate
        self.register_buffer('calls', torch.zeros((), dtype=torch.long))
    def forward(self, z, y):
        self.calls += 1
        return super().forward(z, y)*(1+self.calls/1000)

def test_a_loss_as_a_method(tmp_path, monkeypatch):
    monkeypatch.setitem(methods, 'counting', Method(loss=Counting, loss_options=['label_smoothing']))
    cfg = RunConfig(method='counting', epochs=6, options=dict(label_smoothing=.1))
    learn,whole,_ = run(cfg, verbose=False)
    assert isinstance(learn.loss_func, Counting) and (learn.loss_func.label_smoothing, learn.loss_func.rate) == (.1,.5)
    assert cfg.nets == 1
    with pytest.raises(ValueError, match="did you mean 'label_smoothing'"):
        RunConfig(method='counting', options=dict(label_smothing=.1))
    with monkeypatch.context() as m:
        interrupt_at(m, 3)
        with pytest.raises(KeyboardInterrupt): run(cfg, tmp_path, verbose=False, extras=False, resume=True)
    pd.testing.assert_frame_equal(run(cfg, tmp_path, verbose=False, extras=False, resume=True)[1], whole)

def test_convolutions_are_in_the_faster_layout_on_a_cpu(tmp_path):
    from image_files import make_cifar
    from fastai_jocor.noise import cifar10_classes
    make_cifar(tmp_path/'cifar10', cifar10_classes, 6, 6)
    learn = run_learner(RunConfig('cifar10', noise='symmetric:0.2', bs=20), tmp_path)
    with learn.no_logging(), learn.no_bar(): learn.fit(1, cbs=JoCorCallback(k=2))
    weights = [p for p in learn.model.parameters() if p.ndim == 4]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)

def test_a_title_may_hold_mathematics(tmp_path):
    h = pd.DataFrame(dict(accuracy=[.5,.6], peer_0=[.5,.6]))
    cfg = SimpleNamespace(name='jocor', dataset='cifar10', noise='human:worse:$a^$/x.pt')
    plot_history(h, cfg).savefig(tmp_path/'x.png')
    assert json.loads(json.dumps(summarise(h.assign(peer_accuracy=.5))))['epochs'] == 2
