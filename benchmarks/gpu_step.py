"""Parts `step` and `loader` of gpu.py: milliseconds of a training step, and images a second.

The peers are trained by the published rule on made-up images that lie on the device, by

    adam      fastai's Adam, float32
    fused     torch's fused Adam, float32
    bfloat16  the same, with autocast and channels-last
    no_wait   the same, and fastai's recorder does not read the loss in each step
    evidence  the same, by the default rule
    graphs    the same, with `graphs=True`: the peers' passes are replayed as CUDA graphs, side by side
    in_turn   as `no_wait`, with a graph for each peer, one after the other

and, for two peers, by `usual`: the official step, which sorts the losses of each batch on the CPU. The floor of a step
is the larger of two times: its multiplications and additions at the rate of a large matrix product, and its bytes at
the rate of a large copy. The bytes are those of the optimizer (28 a weight) and of what the layers give (written and
read once, forward and backward).
"""
import statistics, time, torch
from functools import partial
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18
from fastai.callback.channelslast import ChannelsLast
from fastai.vision.all import Adam, AvgSmoothLoss, Callback, default_device, nn
from fastai_jocor.all import JoCorCallback, jocor_cnn, jocor_mlp
from fastai_jocor.lab.run import fast_adam
from fastai_jocor.lab.store import CropFlip
from fastai_jocor.step import AutocastBF16
from gpu import attempt
from timing import Clock, InMemoryDataLoaders, learner, made_up, np
from usual import usual_epoch

class _SmoothLoss(AvgSmoothLoss):
    def accumulate(self, learn):
        self.count += 1
        loss = learn.loss.detach().as_subclass(torch.Tensor).mean()
        self.val = torch.lerp(loss, self.val.to(loss), self.beta)

class DeviceLoss(Callback):
    "Let fastai's recorder keep its running loss on the device during an epoch, so that no step waits"
    order,run_valid = 49,False
    def before_fit(self):
        self.old = self.recorder.smooth_loss
        vars(self.recorder)['smooth_loss'] = _SmoothLoss()
    def before_train(self): self.first = len(self.recorder.losses)
    def after_train(self):
        kept,new = self.recorder.losses[:self.first],self.recorder.losses[self.first:]
        if new: self.recorder.losses = kept + list(torch.stack(new).cpu())
    def after_fit(self): vars(self.recorder)['smooth_loss'] = self.old

def wait(device):
    if device == 'cuda': torch.cuda.synchronize()

class DeviceClock(Clock):
    "Seconds of the training part of each epoch, until the device has done it"
    def before_fit(self): self.times = []
    def before_train(self):
        wait(self.dls.device.type)
        super().before_train()
    def after_train(self):
        wait(self.dls.device.type)
        super().after_train()
        self.times.append(self.seconds)

# --- ways to train

def ways(device):
    "From a name to the optimizer, the callbacks, arguments of `JoCorCallback`, and whether graphs are captured here"
    rule = dict(rule='schedule', forget_rate=.5, num_gradual=0)
    def half(): return [ChannelsLast(), AutocastBF16()]
    def quick(): return [*half(), DeviceLoss()]
    graphed = dict(graphs=(fast_adam, quick, dict(graphs=True), False), in_turn=(fast_adam, quick, rule, True))
    if device == 'cpu': graphed = {}
    return dict(adam=(Adam, list, rule, False), fused=(fast_adam, list, rule, False),
                bfloat16=(fast_adam, half, rule, False), no_wait=(fast_adam, quick, rule, False),
                evidence=(fast_adam, quick, {}, False)) | graphed

def capture(learn, x):
    "Make the forward and backward pass of each peer a CUDA graph, for batches of this shape"
    nets = tuple(learn.model.to('cuda', memory_format=torch.channels_last).train().peers)
    with torch.autocast('cuda', dtype=torch.bfloat16, cache_enabled=False):
        torch.cuda.make_graphed_callables(nets, tuple((x.clone(),) for _ in nets))

def epoch_of(dls, make, k, way):
    "A function that trains for some epochs and gives the seconds of each"
    opt_func,cbs,kwargs,graphed = way
    learn,clock = learner(dls, make(), opt_func, cbs()),DeviceClock()
    if graphed:
        learn.to_peers(k)
        capture(learn, dls.train.one_batch()[0].as_subclass(torch.Tensor))
    cb = JoCorCallback(k=k, **kwargs)
    def epochs(n):
        learn.fit(n, 1e-3, cbs=[cb,clock])
        return clock.times
    return epochs

def usual_of(dls, make, device):
    "The same for two networks by the official code"
    nets = [make().to(device) for _ in range(2)]
    opt = torch.optim.Adam([p for m in nets for p in m.parameters()], lr=1e-3)
    def batches(): return ((x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x,y in dls.train)
    def epoch():
        wait(device)
        start = time.perf_counter()
        usual_epoch(nets, opt, batches(), .5)
        wait(device)
        return time.perf_counter()-start
    return lambda n: [epoch() for _ in range(n)]

def milliseconds(epochs, steps, rounds):
    "Median over some epochs of the time of a step, after one to warm up"
    times = sorted(o/steps*1e3 for o in epochs(rounds+1)[1:])
    return dict(ms=round(statistics.median(times), 3), lowest=round(times[0], 3), highest=round(times[-1], 3))

# --- what the hardware allows

def rate_of(f, amount, device, rounds=10):
    "Amount a second, after one round to warm up"
    f()
    wait(device)
    start = time.perf_counter()
    for _ in range(rounds): f()
    wait(device)
    return amount*rounds/(time.perf_counter()-start)

def rates(device, n, n_bytes):
    "Multiplications and additions a second of a product of (n, n), by dtype, and bytes read and written in a copy"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    res = {}
    for name,dtype in dict(float32=torch.float32, bfloat16=torch.bfloat16).items():
        a = torch.randn(n, n, device=device, dtype=dtype)
        res[name] = rate_of(partial(torch.mm, a, a), 2*n**3, device)
    a = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    return res | dict(copy=rate_of(partial(torch.empty_like(a).copy_, a), 2*n_bytes, device))

def needs(make, shape):
    "Operations of a step of one network, its weights, and the numbers that its layers give; nothing is computed"
    given = [0]
    def count(m, inp, out): given[0] += out.numel()
    with torch.device('meta'): net,x = make(),torch.empty(shape)
    for m in net.modules():
        if not list(m.children()): m.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter: net(x).sum().backward()
    return dict(flops=counter.get_total_flops(), weights=sum(p.numel() for p in net.parameters()), given=given[0])

def floor(need, k, rate, dtype):
    "The least milliseconds of a step"
    size = 2 if dtype == 'bfloat16' else 4
    arithmetic = k*need['flops']/rate[dtype]*1e3
    memory = k*(28*need['weights']+4*size*need['given'])/rate['copy']*1e3
    times = dict(arithmetic_ms=arithmetic, memory_ms=memory, floor_ms=max(arithmetic, memory))
    return {name: round(t, 3) for name,t in times.items()}

def with_floor(make, steps, rounds, least):
    found = milliseconds(make(), steps, rounds)
    return found | least | dict(of_the_floor=round(least['floor_ms']/found['ms'], 3))

# --- the parts

def cases(tiny):
    "From a name to the network, the shape of an image, the batch size and the steps of an epoch"
    if tiny: return {'7-layer network': (jocor_cnn, (16,16,3), 8, 2)}
    return {'7-layer network': (jocor_cnn, (32,32,3), 128, 50),
            'perceptron': (partial(jocor_mlp, 10, 784), (28,28,1), 128, 100),
            'resnet18': (partial(resnet18, num_classes=10), (224,224,3), 64, 10)}

def step(args, note):
    default_device(args.device == 'cuda')
    rounds = 1 if args.tiny else 3
    rate = rates(args.device, *((64,2**16) if args.tiny else (8192,2**30)))
    note('rates, a second', **{k: f'{v:.4g}' for k,v in rate.items()})
    for name,(make,shape,bs,steps) in cases(args.tiny).items():
        dls = made_up(bs*steps, shape, bs)
        need = needs(make, (bs,shape[2],*shape[:2]))
        jobs = [('usual', 2, partial(usual_of, dls, make, args.device))]
        for k in (1,2) if args.tiny else (2,3,1,5):
            jobs += [(way, k, partial(epoch_of, dls, make, k, how)) for way,how in ways(args.device).items()]
        for way,k,make_epochs in jobs:
            what = f'{name} k={k} {way}'
            dtype = 'float32' if way in ('usual','adam','fused') else 'bfloat16'
            if time.time() > args.until: note(what, error='no time was left')
            else: attempt(note, what, with_floor, make_epochs, steps, rounds, floor(need, k, rate, dtype))
    if args.device == 'cpu': note('graphs', skipped='a CPU has no graphs to capture')

def loader(args, note):
    "Whole passes over 50,000 images of 32×32 pixels, without and with crops and flips on the device"
    default_device(args.device == 'cuda')
    n = 512 if args.tiny else 50_000
    images = np.random.RandomState(0).randint(0, 256, (n,32,32,3), dtype=np.uint8)
    def images_a_second(tfms):
        dl = InMemoryDataLoaders.from_arrays(images, np.arange(n)%10, valid=[n-1], bs=128, batch_tfms=tfms).train
        def epoch(): return [0 for _ in dl]
        return dict(images_a_second=round(rate_of(epoch, len(dl)*128, args.device, 1 if args.tiny else 5)))
    for name,tfms in dict(plain=[], crop_flip=[CropFlip()]).items(): attempt(note, name, images_a_second, tfms)
