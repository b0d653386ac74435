"Passes that are recorded as CUDA graphs: on a GPU the fits are the same, and elsewhere one sentence says why not."
import pytest, torch, warnings
from fastai.basics import Adam, Callback, Learner, nn, params, set_seed
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai_jocor import graphs
from fastai_jocor.all import AutocastBF16, digits_dls, JoCorCallback, Peers
from fastai_jocor.lab.run import fast_adam

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')

def small_cnn():
    "A convolution with batch norm; a bias would have no gradient but for rounding, of which Adam makes whole steps"
    layers = [nn.Unflatten(-1, (1,8,8)), nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
              nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return nn.Sequential(nn.Flatten(), *layers)

def two_groups(m): return [params(m[:5]),params(m[5:])]

def trained(use, device='cpu', k=3, epochs=2, fit=Learner.fit, opt_func=Adam, cbs=(), net=small_cnn, drop_last=True,
            **kwargs):
    "Train peers from the same weights on the same batches; gives the learner, its loss in each step, and warnings"
    set_seed(0)
    nets = [net() for _ in range(k)]
    dls = digits_dls('symmetric:0.5', bs=50, device=device)
    dls.train.drop_last = drop_last
    learn = Learner(dls, nets[0], opt_func=opt_func, splitter=two_groups, path='.')
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        fit(learn, epochs, 1e-2, cbs=[JoCorCallback(k, models=nets, seed=0, graphs=use, **kwargs), *cbs])
    return learn, torch.stack(learn.recorder.losses).cpu(), [str(o.message) for o in told if 'graphs' in str(o.message)]

def weights(learn): return torch.cat([o.detach().double().cpu().flatten() for o in learn.model.state_dict().values()])

# --- what a fit does with a graph, by one that runs the networks as they are

class Recorded:
    "Instead of a graph: count its replays, and keep what it was recorded with"
    def __init__(self): self.replays,self.shapes = 0,[]
    def capture(self, nets, xb):
        self.shapes.append([o.shape for o in xb])
        def replay(*x):
            assert all(type(o) is torch.Tensor for o in x)
            self.replays += 1
            return [net(*x) for net in nets]
        return replay

@pytest.fixture
def recorded(monkeypatch):
    rec = Recorded()
    monkeypatch.setattr(graphs, '_capture', rec.capture)
    monkeypatch.setattr(graphs, '_on_gpu', lambda x: True)
    return rec

def test_each_step_replays_the_graph(recorded):
    learn,_,told = trained(True)
    n = len(learn.dls.train)
    assert recorded.replays == 2*n and len(recorded.shapes) == 1 and recorded.shapes[0][0][0] == 50 and not told
    assert torch.equal(weights(learn), weights(trained(False)[0]))
    assert learn.model.graph is None and 'graph' not in vars(learn.model)

def test_a_smaller_batch_runs_as_usual(recorded):
    learn,_,told = trained(True, drop_last=False)
    n = len(learn.dls.train)
    assert recorded.replays == 2*(n-1) and len(told) == 1 and 'epoch 0' in told[0] and 'first batch' in told[0]
    assert torch.equal(weights(learn), weights(trained(False, drop_last=False)[0]))

class FreezeLater(Callback):
    def before_epoch(self):
        if self.epoch == 1: self.learn.freeze()

def test_layers_that_are_frozen_during_a_fit(recorded):
    learn,_,told = trained(True, cbs=[FreezeLater()])
    assert recorded.replays == len(learn.dls.train) and len(told) == 1 and 'epoch 1' in told[0]

def test_every_fit_records_anew(recorded):
    def twice(learn, epochs, lr, cbs):
        learn.fit(1, lr, cbs=cbs)
        learn.freeze()
        learn.fit(1, lr, cbs=cbs)
    assert not trained(True, fit=twice)[2] and len(recorded.shapes) == 2

def test_validation_runs_as_usual(recorded):
    learn = trained(True)[0]
    before = recorded.replays
    learn.validate()
    learn.get_preds()
    assert recorded.replays == before

@pytest.mark.parametrize('error', (RuntimeError('no such kernel'), KeyboardInterrupt()))
def test_a_fit_that_is_broken_off(recorded, monkeypatch, error):
    def fails(nets, xb):
        def replay(*x): raise error
        return replay
    monkeypatch.setattr(graphs, '_capture', fails)
    seen = []
    def broken(learn, epochs, lr, cbs):
        seen.append(learn)
        learn.fit(epochs, lr, cbs=cbs)
    with pytest.raises(type(error)): trained(True, fit=broken)
    assert 'graph' not in vars(seen[0].model) and seen[0].model.eval()(torch.zeros(2,8,8)).shape == (2,10)

# --- why not

def fails(nets, xb): raise RuntimeError('operation not permitted when stream is capturing')

def test_recording_fails(recorded, monkeypatch):
    monkeypatch.setattr(graphs, '_capture', fails)
    learn,_,told = trained(True)
    assert len(told) == 1 and 'operation not permitted' in told[0]
    assert torch.equal(weights(learn), weights(trained(False)[0]))

class Hooked(Callback):
    def before_epoch(self): self.hook = self.model.peers[0][1].register_forward_hook(lambda *args: None)
    def after_epoch(self): self.hook.remove()

def test_hooks(recorded):
    told = trained(True, cbs=[Hooked()])[2]
    assert len(told) == 1 and 'hooks' in told[0] and not recorded.shapes

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_cnn()
    def reset(self): pass
    def forward(self, x): return self.net(x)
    def __getitem__(self, i): return self.net[i]

def test_recurrent_layers(recorded):
    told = trained(True, net=Recurrent)[2]
    assert len(told) == 1 and 'recurrent' in told[0] and not recorded.shapes

def test_a_cpu():
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    learn,_,told = trained(True)
    assert len(told) == 1 and 'not on a GPU' in told[0]
    assert torch.equal(weights(learn), weights(trained(False)[0]))

# --- on a GPU

class Half(MixedPrecision):
    def __init__(self): super().__init__(init_scale=2.**10)

WAYS = dict(adam={}, fused=dict(opt_func=fast_adam), accumulated=dict(cbs=[GradientAccumulation(100)]),
            accumulated_fused=dict(opt_func=fast_adam, cbs=[GradientAccumulation(100)]), one=dict(k=1),
            schedule=dict(rule='schedule', forget_rate=.5, num_gradual=0), smaller=dict(drop_last=False),
            fine_tuned=dict(fit=lambda learn, n, lr, cbs: learn.fine_tune(n, lr, cbs=cbs)),
            frozen=dict(cbs=[FreezeLater()]), bfloat16=dict(cbs=[AutocastBF16()]), float16=dict(cbs=[Half()]))

@on_gpu
@pytest.mark.parametrize('way', WAYS)
def test_the_same_fit_on_a_gpu(way):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    (plain,want,_),(graphed,got,told) = (trained(use, 'cuda', **WAYS[way]) for use in (False,True))
    assert len(told) == (way in ('smaller','frozen')), told
    loose = 3e-2 if 'float16' in way else 1e-3
    assert torch.allclose(got, want, atol=loose, rtol=loose)
    if loose == 1e-3: assert (weights(plain)-weights(graphed)).abs().max() < 5e-3
    x = torch.rand(5,8,8, device='cuda')
    assert graphed.model.eval()(x).shape == (5,10)

@on_gpu
def test_save_load_and_find_on_a_gpu(tmp_path):
    learn,_,told = trained(True, 'cuda')
    learn.save(tmp_path/'a')
    before = weights(learn)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=20, show_plot=False, cbs=JoCorCallback(3, graphs=True))
        learn.fit(1, 1e-2, cbs=JoCorCallback(3, graphs=True))
        assert not torch.equal(weights(learn), before)
        learn.load(tmp_path/'a')
    assert torch.equal(weights(learn), before) and not told
