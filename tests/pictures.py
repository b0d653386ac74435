"Digits as image files"
import numpy as np
from fastai.vision.all import PILImage
from sklearn.datasets import load_digits

def digit_files(folder, n, classes=3):
    "Write the digits below `classes` among the first `n` digits as image files, a folder for each class"
    d = load_digits()
    for i,(im,t) in enumerate(zip(d.images[:n+1], d.target)):
        if t >= classes: continue
        (folder/f'c{t}').mkdir(parents=True, exist_ok=True)
        PILImage.create(np.repeat((im*15).astype(np.uint8)[...,None], 3, -1)).save(folder/f'c{t}'/f'{i}.png')
    return folder
