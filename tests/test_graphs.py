"Passes that are recorded as CUDA graphs: on a GPU the fits are the same, and elsewhere one sentence says why not."
import pytest, torch, warnings
from fastai.basics import (Adam, Callback, CancelBatchException, DataLoader, Learner, load_learner, nn, params,
                           set_seed)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai_jocor import graphs
from fastai_jocor.all import AutocastBF16, digits_dls, JoCorCallback, Peers
from fastai_jocor.lab.run import fast_adam
from fastai_jocor.per_sample import plain
from static_graph import StaticGraph

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

# --- what a fit does with a graph, by one that stands for it on a CPU

@pytest.fixture
def recorded(monkeypatch):
    "The graphs that were recorded"
    found = []
    def capture(nets, xb):
        found.append(StaticGraph(nets, xb))
        return found[-1]
    monkeypatch.setattr(graphs, '_capture', capture)
    monkeypatch.setattr(graphs, '_on_gpu', lambda x: True)
    return found

def replays(recorded): return sum(o.replays for o in recorded)

class FreezeLater(Callback):
    def before_epoch(self):
        if self.epoch == 1: self.learn.freeze()

class Half(MixedPrecision):
    def __init__(self): super().__init__(init_scale=2.**10)

WAYS = dict(adam={}, fused=dict(opt_func=fast_adam), accumulated=dict(cbs=[GradientAccumulation(100)]),
            accumulated_fused=dict(opt_func=fast_adam, cbs=[GradientAccumulation(100)]), one=dict(k=1),
            schedule=dict(rule='schedule', forget_rate=.5, num_gradual=0), smaller=dict(drop_last=False),
            fine_tuned=dict(fit=lambda learn, n, lr, cbs: learn.fine_tune(n, lr, cbs=cbs)),
            frozen=dict(cbs=[FreezeLater()]), bfloat16=dict(cbs=[AutocastBF16()]), float16=dict(cbs=[Half()]))

@pytest.mark.parametrize('way', [o for o in WAYS if o != 'float16'])
def test_the_same_fit(recorded, way):
    "Exactly, although each replay writes over the gradients of the one before it"
    (plain,want,_),(graphed,got,told) = (trained(use, **WAYS[way]) for use in (False,True))
    assert replays(recorded) and len(told) == (way in ('smaller','frozen')), told
    assert torch.equal(got, want) and torch.equal(weights(plain), weights(graphed))

def test_each_step_replays_the_graph(recorded):
    learn,_,told = trained(True)
    n = len(learn.dls.train)
    assert replays(recorded) == 2*n and len(recorded) == 1 and not told
    assert torch.equal(weights(learn), weights(trained(False)[0]))
    assert learn.model.graph is None and 'graph' not in vars(learn.model)

def test_a_smaller_batch_runs_as_usual(recorded):
    learn,_,told = trained(True, drop_last=False)
    n = len(learn.dls.train)
    assert replays(recorded) == 2*(n-1) and len(told) == 1 and 'epoch 0' in told[0] and 'first batch' in told[0]
    assert torch.equal(weights(learn), weights(trained(False, drop_last=False)[0]))

def test_layers_that_are_frozen_during_a_fit(recorded):
    learn,_,told = trained(True, cbs=[FreezeLater()])
    assert replays(recorded) == len(learn.dls.train) and len(told) == 1 and 'epoch 1' in told[0]

def test_every_fit_records_anew(recorded):
    def twice(learn, epochs, lr, cbs):
        learn.fit(1, lr, cbs=cbs)
        learn.freeze()
        learn.fit(1, lr, cbs=cbs)
    assert not trained(True, fit=twice)[2] and len(recorded) == 2

def test_validation_runs_as_usual(recorded):
    learn = trained(True)[0]
    before = replays(recorded)
    learn.validate()
    learn.get_preds()
    assert before and replays(recorded) == before

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
    assert len(told) == 1 and 'hooks' in told[0] and not recorded

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_cnn()
    def reset(self): pass
    def forward(self, x): return self.net(x)
    def __getitem__(self, i): return self.net[i]

def test_recurrent_layers(recorded):
    told = trained(True, net=Recurrent)[2]
    assert len(told) == 1 and 'recurrent' in told[0] and not recorded

def test_a_cpu():
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    learn,_,told = trained(True)
    assert len(told) == 1 and 'not on a GPU' in told[0]
    assert torch.equal(weights(learn), weights(trained(False)[0]))

# --- what a graph must not be used for

def both(recorded, cb, **kwargs):
    "The weights with and without a graph, what was told, and how often the graph was used in a step"
    (plain,*_),(graphed,_,told) = (trained(use, cbs=[cb()], **kwargs) for use in (False,True))
    return torch.equal(weights(plain), weights(graphed)), told, replays(recorded)/len(plain.dls.train)

class SecondPass(Callback):
    "Adds what a second pass in the same batch gives to the loss, as consistency losses do"
    run_valid = False
    def after_pred(self): self.other = self.model(*self.xb)
    def after_loss(self): self.learn.loss_grad = self.learn.loss_grad+.1*self.other.pow(2).mean()

class Scaled(Callback):
    "Scales the gradient of a weight when it is computed"
    def before_fit(self): self.hook = self.model.peers[0][-1].weight.register_hook(lambda g: .1*g)
    def after_fit(self): self.hook.remove()

class Replaced(Callback):
    "Gives a weight memory of its own, as averaging of weights may do"
    run_valid = False
    def before_epoch(self):
        for p in self.model.peers[0].parameters(): p.data = p.data*.5

class WantsGradient(Callback):
    order,run_valid = -20,False
    def before_batch(self):
        self.x = plain(self.xb[0]).clone().requires_grad_()
        self.learn.xb = self.x,
    def after_backward(self): assert self.x.grad.abs().sum() > 0

class Cancels(Callback):
    "Cancels each second batch after the graph was made ready, and gives the next one fewer items"
    order,run_valid = 95,False
    def before_batch(self):
        if self.iter%2: raise CancelBatchException

@pytest.mark.parametrize('cb,warns,used', ((SecondPass,'',2), (Replaced,'first batch',1), (Cancels,'',1),
    (Scaled,'hooks on its weights',0), (WantsGradient,'gradient of an input',0)))
def test_what_others_do_in_a_batch(recorded, cb, warns, used):
    same,told,times = both(recorded, cb)
    assert same and len(told) == bool(warns) and all(warns in o for o in told)
    assert times == pytest.approx(used, abs=.1)

class Counts(nn.Module):
    "A running mean that is replaced, not changed in place"
    def __init__(self):
        super().__init__()
        self.net = small_cnn()
        self.register_buffer('mean', torch.zeros(()))
    def forward(self, x):
        self.mean = .9*self.mean + .1*x.mean().detach()
        return self.net(x)+self.mean
    def __getitem__(self, i): return self.net[i]

def test_buffers_that_are_replaced(recorded):
    (plain,*_),(graphed,_,told) = (trained(use, net=Counts) for use in (False,True))
    assert len(told) == 1 and 'first batch' in told[0] and replays(recorded) <= 1

class Exports(Callback):
    run_valid = False
    def after_epoch(self): self.learn.export(self.file)

def test_export_within_a_fit(recorded, tmp_path):
    cb = Exports()
    cb.file = tmp_path/'learner.pkl'
    trained(True, cbs=[cb])
    assert load_learner(cb.file).model.graph is None

def test_a_loader_that_pins_memory(recorded):
    learn = trained(True)[0]
    assert not graphs._pins_memory(learn.dls.train)
    ds = torch.utils.data.TensorDataset(torch.zeros(4, 2))
    for n,pins in ((0,False), (2,True)):
        assert graphs._pins_memory(DataLoader(ds, bs=2, num_workers=n, pin_memory=True)) == pins

def test_nothing_else_is_told(recorded):
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*shadowing.*')
        set_seed(0)
        learn = Learner(digits_dls(bs=50, device='cpu'), small_cnn())
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=JoCorCallback(graphs=True))
    assert recorded

# --- on a GPU

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

class Reads(nn.Module):
    "Reads a value in its forward pass, which cannot be recorded"
    def __init__(self):
        super().__init__()
        self.net = small_cnn()
    def forward(self, x): return self.net(x) if x.sum().item() else x
    def __getitem__(self, i): return self.net[i]

@on_gpu
@pytest.mark.skipif(torch.__version__ < '2.12', reason='torch does not recover from a graph that cannot be recorded')
def test_a_network_that_cannot_be_recorded_on_a_gpu():
    stream = torch.cuda.current_stream()
    learn,_,told = trained(True, 'cuda', net=Reads)
    assert len(told) == 1 and 'recording it failed' in told[0] and torch.cuda.current_stream() == stream
    assert (weights(learn)-weights(trained(False, 'cuda', net=Reads)[0])).abs().max() < 5e-3
