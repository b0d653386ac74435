"The compared methods: against loops written out, by property over random input, and through a learner's life."
import copy, numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from fastai.vision.all import BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, ProgressCallback, accuracy, nn, noop, set_seed
from fastai_jocor.all import *
from fastai_jocor.bench import fast_adam

teaching = pytest.mark.parametrize('method', (CoTeachingCallback, CoTeachingPlusCallback))

def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def digits(noise=Symmetric(.5), seed=0, opt_func=fast_adam, **kwargs):
    set_seed(seed)
    dls = digits_dls(noise=noise, seed=seed)
    return quiet(Learner(dls, jocor_mlp(dls.c, n_in=64), metrics=accuracy, opt_func=opt_func, **kwargs))

def digits64(weight=None):
    "Digits as float64 pixels in plain loaders, half of the labels wrong: no rounding decides which items are kept"
    from sklearn.datasets import load_digits
    d = load_digits()
    x,y = torch.as_tensor(d.data/16),torch.as_tensor(Symmetric(.5).corrupt(d.target, 10))
    dls = DataLoaders(DataLoader(list(zip(x[:1200],y[:1200])), bs=64, shuffle=True), DataLoader(list(zip(x[1200:],y[1200:])), bs=64))
    return quiet(Learner(dls, jocor_mlp(10,64).double(), loss_func=nn.CrossEntropyLoss(weight=weight), opt_func=fast_adam))

class Record(Callback):
    "Keep the batches of a fit"
    order,run_valid = 20,False
    def __init__(self): self.batches = []
    def before_batch(self): self.batches.append((self.epoch, self.xb[0].clone(), self.yb[0].clone()))

def small(losses, rate, among):
    "Which of the items `among` have the smallest losses, by numpy"
    if not len(among): return among
    return among[np.argsort(losses[among], kind='stable')[:max(int((1-rate)*len(among)), 1)]]

def choose(zs, y, rate, plus, weight=None):
    "For each network the items on which it trains, one item and one pair of networks after the other"
    k,n = len(zs),len(y)
    losses = [np.array([F.cross_entropy(z[i:i+1], y[i:i+1], weight=weight, reduction='none').item() for i in range(n)]) for z in zs]
    best = [z.argmax(-1).tolist() for z in zs]
    pairs = [(m, 0 if m == k-1 else m+1) for m in range(k)]
    return [small(losses[t], rate, np.array([i for i in range(n) if not plus or best[m][i] != best[t][i]], dtype=int)) for m,t in pairs]

def loop(nets, batches, rates, plus, lr, weight=None):
    "Each network with an optimizer of its own, and a mean over what another one chose for it"
    opts,shares = [torch.optim.Adam(m.parameters(), lr=lr) for m in nets],[]
    for epoch,x,y in batches:
        zs = [m(x) for m in nets]
        chosen = choose([z.detach() for z in zs], y, rates[epoch], plus, weight)
        shares.append((epoch, sum(map(len, chosen))/len(nets), len(y)))
        for opt,z,idx in zip(opts, zs, chosen):
            losses = F.cross_entropy(z, y, weight=weight, reduction='none')
            opt.zero_grad()
            (losses[torch.as_tensor(idx)].mean() if len(idx) else losses.sum()*0).backward()
            opt.step()
    return shares

@pytest.mark.parametrize('k,weight', ((2,None),(3,None),(3,torch.linspace(.5,2,10,dtype=torch.float64))))
@teaching
def test_same_weights_as_a_loop(method, k, weight):
    learn,rec = digits64(weight),Record()
    nets = [jocor_mlp(10,64).double() for _ in range(k)]
    twins = copy.deepcopy(nets)
    cb = method(k=k, models=nets, forget_rate=.5)
    learn.fit(4, 1e-3, cbs=[cb, rec])
    shares = loop(twins, rec.batches, [0,.5,.5,.5], method is CoTeachingPlusCallback, 1e-3, weight)
    assert len(rec.batches) == 4*len(learn.dls.train) and cb.history.forget_rate.tolist() == [0,.5,.5,.5]
    for m,t in zip(learn.model.peers, twins):
        for a,b in zip(m.parameters(), t.parameters()): torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    for e in range(4):
        kept,n = (sum(s[i] for s in shares if s[0]==e) for i in (1,2))
        assert cb.history.kept[e] == pytest.approx(kept/n, rel=1e-6)

def test_peers_teach_each_other():
    "A loop of self-taught networks gives other weights: the exchange is not lost in the tolerance"
    learn,rec = digits64(),Record()
    nets = [jocor_mlp(10,64).double() for _ in range(2)]
    twins = copy.deepcopy(nets)
    learn.fit(2, 1e-3, cbs=[CoTeachingCallback(models=nets, forget_rate=.5, num_gradual=0), rec])
    opts = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in twins]
    for _,x,y in rec.batches:
        for m,opt in zip(twins, opts):
            losses = F.cross_entropy(m(x), y, reduction='none')
            opt.zero_grad()
            losses[select_small(losses, .5)].mean().backward()
            opt.step()
    assert max((a-b).abs().max().item() for a,b in zip(learn.model.parameters(), nn.ModuleList(twins).parameters())) > 1e-3
