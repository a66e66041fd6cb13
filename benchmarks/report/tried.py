"""What was tried to make a guard cheaper, what did not pay included; docs/performance.md has it as a table."""

from __future__ import annotations

# (change, what was predicted of the share of the unguarded rate, what came out on two cores, verdict)
TRIED = [
    (
        "gate: the auxiliary only for the tenth of images that need it",
        "2.35 networks become 1.45: .43 to .69",
        ".71 (ResNet-20, batch 128)",
        "kept: no attack is caught less ([decision 9](decisions/0009-distances-at-several-places-and-a-gate.md))",
    ),
    (
        "experts and auxiliary in bfloat16 where the device is fast at it",
        "tails and auxiliary at a quarter: .88",
        ".80 to .83 beside two busy processes, .86 alone",
        "kept: TPR and AUROC of four suspects the same in the third digit",
    ),
    ("distances at four places instead of one", "under 1%", "0.5 of 157 ms at batch 128", "kept"),
    (
        "batch norms of experts and auxiliary folded into their convolutions",
        "an expert and the auxiliary a fifth faster, .93 by their parts",
        "expert 2.36 to 1.81 ms, auxiliary 47.9 to 34.4 ms at batch 128; .86 to .87 (ResNet-20), .83 to .86 (ResNet-18)",
        "kept: TPR of five suspects the same in the third digit",
    ),
    (
        "guard traced, norms of the suspect folded, several batches at once",
        "not predicted",
        "1.0 times, and 549 to 893 images/s over HTTP with 64 callers (AMX)",
        "kept",
    ),
    (
        "suspect in ONNX Runtime",
        "not predicted",
        "suspect 268 to 157 ms at batch 128, 3.1 to 1.6 ms at batch 1; guard .90 to 1.00 of the unguarded rate (AVX2)",
        "kept where it is faster at load",
    ),
    ("suspect in OpenVINO", "not predicted", "179 and 2.3 ms", "not taken: slower, and larger"),
    (
        "suspect by `torch.compile`, weights frozen",
        "not predicted",
        "159 ms at batch 128, 4.7 ms at batch 1",
        "not taken: needs a compiler on the server",
    ),
    ("TorchScript's `optimize_for_inference`", "not predicted", "4.3 ms at batch 1, where the plain trace takes 3.3", "not taken"),
    (
        "weights of experts and auxiliary in bfloat16 without bfloat16 arithmetic",
        "weights 3.2 to 2.3 times the suspect's, under 1% slower",
        "3.20 to 2.29 by a bundle's files; no slower in two runs apart, which were not compared side by side",
        "kept",
    ),
    ("what is alive at start is left to no garbage collection", "not predicted", "knee over HTTP 450 to 750 images/s (AMX)", "kept"),
    ("uvloop, and malloc that gives nothing back", "not predicted", "no difference", "not taken"),
    (
        "the interpreter's lock changes hands after 0.3 ms, not 5",
        "not predicted",
        "of 350 images/s 94% within 100 ms, before 16%; one run each (AVX2)",
        "kept",
    ),
    ("the usual predict call past FastAPI's routing and middleware", "1.2 to 0.75 ms of the event loop", "1.2 to 1.0 ms (AVX2)", "kept"),
    (
        "refusal at the door, by how long others take",
        "not predicted",
        "of 1,500 images/s 29 answered in time a second, at the door 130 to 290, with the two above 330 to 380 (AVX2)",
        "kept",
    ),
    (
        "PNGs of up to 64x64 decoded by the event loop itself",
        "4.5 to 4.0 ms of CPU time a request",
        "4.5 to 4.3 ms at 350 images/s; half within 41 to 83 ms before, 18 to 44 after; knee up to 350 before, mostly 400 to 500 after; runs apart (AVX2)",
        "kept ([decision 12](decisions/0012-the-event-loop-gives-way.md))",
    ),
    (
        "the event loop gives way to the threads that judge (niceness 10)",
        "not predicted",
        "of 2,500 images/s 165 to 200 answered in time a second, at niceness 5 250 to 330, at 10 350 to 380, "
        "later 150 to 360; of 2,000 images/s 431 before and 427 after; of 430 images/s 99% within 96 and 103 ms before, 75 and 129 after (AVX2)",
        "kept",
    ),
    (
        "at most 32 sockets in a turn of the event loop",
        "the device waits less for its next batch in a storm",
        "all but the first 32 that epoll tells of left for later: nothing was answered in the storm; epoll asked for 32 was not measured",
        "not taken",
    ),
    ("a copy less from PNG to tensor", "not predicted", "0.17 to 0.12 ms an image (AVX2)", "kept"),
    (
        "a second batch only once several images wait, so that batches are fuller",
        "networks 4.2 to 2.8 ms a request, knee 300 to 420",
        "half answered within 21 to 34 ms instead of 14 at 150 images/s, and a lower knee (AVX2)",
        "not taken: the prediction was wrong",
    ),
    (
        "the three tails as one, by grouped convolutions",
        "0.5 of 3.75 ms for a single image",
        "tails 0.67 to 0.61 ms for a single image, 12.9 to 15.3 ms for 32 (AVX2)",
        "not taken: the prediction was wrong",
    ),
    (
        "auxiliary in ONNX Runtime too, with its weights kept in bfloat16",
        "not predicted",
        "2.3 to 1.9 ms for a single image, 54.8 to 56.5 ms for 32; with float32 weights 1.3 and 33.4 ms, and by their sizes 2.8 times the suspect's (AVX2)",
        "not taken",
    ),
    (
        "gate: a twentieth instead of a tenth",
        ".80 to .84 (ResNet-20, AVX2)",
        "204 to 198 ms at batch 128, .80 of the unguarded rate before and after; .77 to .82 at batch 32; runs apart",
        "kept: of four suspects that are not caught whole one is caught less, .987 to .981; it saves half of what was predicted",
    ),
    (
        "two experts instead of three",
        ".80 to .86 (ResNet-20, AVX2)",
        "with the next two .81 to .95 (ResNet-20, batch 128), .76 to .84 and .78 (ResNet-18, batch 8); weights 2.29 to 2.15; TPR .973 to .969, .957 to .953",
        "kept ([decision 1](decisions/0001-experts-are-tails-on-the-suspects-trunk.md)): up to 0.4 points less are caught, less than another seed does",
    ),
    (
        "gate: three times the target FPR, so 3% instead of 5%",
        "5 of 196 ms at batch 128",
        "not measured apart from the one before",
        "kept ([decision 9](decisions/0009-distances-at-several-places-and-a-gate.md)): TPR of four suspects the same within .002",
    ),
    (
        "the tails' convolutions by Winograd's F(4x4, 3x3), with products of torch",
        "tails 47 to 25 ms at batch 128, off by 2e-6 instead of 7e-7",
        "a convolution of 128 images 6.4 to 7.5 ms, of 32 2.2 to 2.0, of 8 .64 to .67 (8x8, 64 channels, one thread); off by 2e-6 (AVX2)",
        "not taken: spreading and gathering take what fewer products save; it would need a kernel of its own, and so a compiler",
    ),
    (
        "what serves is chosen by looks at 1, 8 and 32 images, half a second each, not by one at 8",
        "not predicted",
        "at 8 images the two programs are alike, at 1 and 32 they are not: with 8 alone TorchScript was taken, .84 of the unguarded rate; "
        "with all three ONNX Runtime in four of four, .92 at 32 and .97 at 128 (ResNet-20, AVX2)",
        "kept: loading a bundle takes 3.3 s instead of 1.6 (ResNet-20); of a large network the smaller batches have to do",
    ),
    (
        "features averaged over their maps inside ONNX Runtime, which gives no maps and no normalised images any more",
        "batch 8: 3% less time (ResNet-20), 5% (ResNet-18)",
        "the best turn of three runs each: ResNet-20 50.4 to 46.7 ms for 32, 14.2 to 14.3 for 8; the median of two: ResNet-18 508 to 495 ms for 8 (AVX2)",
        "kept: up to 7% where it is not lost in the noise, and `Guard.flow` says what it gives",
    ),
    (
        "what serves is chosen by the best of seven turns, not the median of five",
        "not predicted",
        "in one of three runs the median chose the slower program: ResNet-20 with the suspect in TorchScript, .86, in ONNX Runtime .95",
        "kept: what else the machine does makes a turn slower, never faster",
    ),
    (
        "gate and auxiliary inside the program, which comes back to the interpreter some 5 times a batch instead of some 25",
        "knee over HTTP 400 to 500 images/s",
        "judging beside a busy interpreter 100 to 121 single images a second, 62 to 73 batches of 4, one run each; alone a single image .3 of 3 ms less, "
        "batches alike; over HTTP no difference that the noise of runs apart would show (AVX2)",
        "kept, though over HTTP the prediction was wrong",
    ),
    (
        "a judge takes its next batch itself, without the event loop",
        "not predicted",
        "of 430 images/s 99% within 146 and 258 ms, without it within 68 to 108: taken at once, batches are smaller, and cost more an image (AVX2)",
        "not taken",
    ),
    (
        "one batch at a time, the other core for the event loop",
        "of 500 images/s 99% within 100 ms",
        "of 430 images/s 99% within 185 to 340 ms, with two within 68 to 108, though a request takes 2.8 to 3.3 ms of CPU time and not 3.5 to 3.7 (AVX2)",
        "not taken: the prediction was wrong",
    ),
    (
        "a second batch only once as many images wait as the running one has, at most 8",
        "not predicted",
        "of 430 images/s 99% within 100 and 118 ms, without it within 82 and 93; CPU time of a request 3.5 ms, without it 3.5 to 3.7 (AVX2)",
        "not taken",
    ),
    (
        "a batch takes its part of what waits for all slots, also while others are busy, so that the next slot finds some",
        "of 500 images/s 99% within 80 ms instead of 100",
        "within 92 and 110 ms, with at least 4 at once 103 and 140, without it within 113 and 118 (AVX2)",
        "not taken: the prediction was wrong",
    ),
    (
        "a refusal at the door is written by the protocol, as soon as it has read the head, without a scope and a task",
        "a quarter of a core less in a storm, 130 images/s more",
        "of 4,000 images/s 554 answered in time a second before and 731 after, medians of twelve turns each, alternately; the event loop .73 and .66 of a "
        "core (AVX-512 with bfloat16)",
        "kept ([decision 14](decisions/0014-a-storm-is-refused-where-it-costs-least.md))",
    ),
    (
        "32 new connections accepted in a turn of the event loop, and 128 or 256 that wait for it, instead of 2,048",
        "after a stop, when all callers have left and come again, it recovers while the storm goes on",
        "after a stop of 2.2 s at 4,000 images/s, from the second second on, with 128 between 365 and 605 answered a second, with 256 between 251 and 501, "
        "without it none until the storm ends; in a storm without a stop 526 and 589 in time instead of 643, medians of six (AVX-512 with bfloat16)",
        "not taken: it should hold only while the event loop is late, as the next one does",
    ),
    (
        "of the connections that wait in the kernel 2,048 at most, and 128 while they wait for more than a tenth of a second; those whose callers have left "
        "are passed over",
        "after a stop it recovers, and a storm without one is the same",
        "after a stop of 2.2 s at 4,000 images/s it judges in time again in 8 of 10 trials, without it in 0 of 8; without a stop 559 in time a second, without "
        "it 622, medians of twelve (AVX-512 with bfloat16)",
        "kept ([decision 15](decisions/0015-who-waits-unread-has-waited.md))",
    ),
    (
        "the time for which a request lay unread counts against its deadline",
        "it recovers from those stops too that the short queue alone does not end",
        "with both in 11 of 12; without a stop 645 in time a second, with neither 648, medians of thirteen (AVX-512 with bfloat16)",
        "kept ([decision 15](decisions/0015-who-waits-unread-has-waited.md))",
    ),
    (
        "at most 12 images a batch, since an image in more of them is hardly cheaper",
        "shorter waits at the same rate",
        "of 850 images/s 99% within 89, 126, 179, 119 and 456 ms, without it within 150, 137, 151, 166 and 302; of 950 images/s .06, .70 and .03 in time, "
        "without it .76, .96 and .84; at most 4, 8 and 20 no better, nor as many more as wait (AVX-512 with bfloat16)",
        "not taken: the prediction was wrong, and where there is too much, fuller batches carry more",
    ),
    (
        "programs are compared with as many threads as will serve",
        "not predicted",
        "a server's thread that loads a bundle computes with all cores: TorchScript was taken in five of five, with one thread ONNX Runtime in five of five; "
        "2.5 to 2.0 ms of CPU time an image in batches of 6 and 7 over HTTP (ResNet-20, AVX2)",
        "kept: what was measured over HTTP since there is this choice was, by these counts, of the slower program",
    ),
    (
        "ReLU and residual sum inside oneDNN's convolution, for experts and auxiliary",
        "auxiliary 22 to 14 ms for 13 images",
        "a convolution with ReLU .71 to 1.06 ms, in one .71 to 1.07 (13 images, one thread; AVX2)",
        "not taken: no faster, the prediction was wrong",
    ),
    (
        "torchvision's decoder for small PNGs",
        "not predicted",
        "0.16 to 0.20 ms an image by Pillow, 0.07 to 0.11 by libpng; the event loop .84 to .97 ms a request before, .72 to .93 after; "
        "of 560 images/s 99% within 172 and 490 ms before, 96 and 324 after (AVX2)",
        "not taken: a fortieth of a request's time, for a second parser of hostile files",
    ),
    (
        "malloc keeps large blocks, for networks of ImageNet's size",
        "not predicted",
        "ResNet-18 at batch 8: unguarded 29 to 35 and 34 to 39 images/s, guarded 22 to 26 and 27 to 28, in two pairs of runs (AVX2)",
        "not taken yet: what it does to memory over many activations is not measured",
    ),
    ("distances kept in bfloat16", "no faster; weights 2.7 to 2.3 times the suspect's", "2.69 to 2.30 (ResNet-20), 2.40 to 2.26 (ResNet-18)", "kept: the same"),
    (
        "the source of a traced graph goes with it; what is free after a bundle was loaded goes back to the system",
        "of 231 KiB that an activation left, most are the types of TorchScript's programs",
        "they are the sources of 45 graphs; 43 KiB an activation without those, 9 with both, and 747 MiB held after 200 activations instead of 853, for 6 ms "
        "an activation; one run each (AMX)",
        "kept",
    ),
    (
        "on a GPU, CUDA graphs of the guard's two steps, for batches of up to the largest",
        "what is left of 200 launches are 40, .3 ms: of the rate of a suspect launched kernel by kernel, .59 to above .9 (ResNet-20, batch 2,048, H100), "
        "and a single image in less time than it takes",
        "no GPU was within reach: only that they judge as the guard does, with a stand-in that records",
        "kept, for they serve only where they repeat the guard's judgements when it is loaded ([decision 18](decisions/0018-on-a-gpu-a-guard-is-recorded.md))",
    ),
    (
        "uvicorn's loop waits for a signal instead of looking for one ten times a second",
        "half of 19 wake-ups a second, and of .6 to 1.6% of a core, go",
        "five wake-ups a second, .1% of a core over thirty seconds; by the benchmark's five seconds .6 and 1.6%, and 0 to .4% since ONNX Runtime's telemetry "
        "is off, before .4 and .6% (AVX2)",
        "kept",
    ),
    (
        "what the event loop does for a request: a timer looks at a moved deadline instead of being made anew, no timer for what is decoded at once, one "
        "callback for a deadline in the queue, the Host is judged once, and 20,000 young objects before they are collected instead of 700",
        "a quarter of 40 us that a refusal takes, a tenth of 430 us of an image",
        "33 and 56 us instead of 41 and 66, and 428 and 608 instead of 486 and 513, in two turns beside busy processes; of 2,500 images/s 559 answered in time "
        "a second, before 411, medians of nine turns and of fifteen, half an hour apart (AVX2)",
        "kept",
    ),
    (
        "the load of the benchmark is made by bare sockets instead of tasks",
        "half of what the load takes of the cores that it shares with the server",
        ".43 and .26 of a core at 2,600 images/s (AVX2)",
        "kept: every server gets the same",
    ),
    (
        "uvloop",
        "timers and sockets at half the price",
        ".46 to .48 of a core at 480 images/s, with asyncio .48 to .49; of 2,500 images/s 245 to 320 in time, with asyncio 360 to 458: it does not ask our "
        "listening socket for connections (AVX2)",
        "not taken",
    ),
    (
        "a full batch is handed over while the device is still busy",
        "the fifth of the cores that is idle in a storm",
        "381 and 461 of 2,500 images/s in time, without it 470 and 478 (AVX2)",
        "not taken: what the threads that judge wait for is the interpreter's lock",
    ),
    (
        "epoll asked for 16 or 64 sockets at a time",
        "what the device has judged is answered within milliseconds, whatever else there is to read",
        "of 2,500 images/s 467 and 552 in time, and 267 and 435, without it 687 and 475; answers a second old among them (AVX2)",
        "not taken: what waits to be read grows stale",
    ),
    (
        "the event loop at niceness 0 or 5 instead of 10, now that it does less",
        "not predicted",
        "of 3,000 images/s 513 and 461 in time, with 10 478, medians of eight; of 5,000 at 0 46 to 284, with 10 108 to 426 (AVX2)",
        "not taken",
    ),
    (
        "in a storm, what came whole and is framed in the one way that nobody reads differently is refused without the parser",
        "33 us of a refusal become 20; of the event loop's time in a storm a tenth",
        "21 to 32 us instead of 33; of 3,000 images/s 530 in time, without it 520, medians of fifteen turns each (AVX2)",
        "not taken: a second reader of what strangers send, for nothing that can be seen",
    ),
    (
        "around the network NumPy instead of torch, whose every call lets the interpreter's lock go",
        "ten waits for the lock a batch less: a twentieth",
        "of 4,000 and 4,500 images/s 1,033 and 1,010 in time, without it 1,083 and 1,050, medians of eight (AVX-512 without AMX)",
        "not taken: the prediction was wrong",
    ),
    (
        "a queue that stays may take a quarter of the deadline that is left, only a crowd that comes at once half of it",
        "half as many images under way in a storm, and less that they push out of the caches",
        "of 4,500 to 5,000 images/s with a quarter 1,099, 1,044 and 978 in time, with half 1,050, 972 and 888, medians of six to eight; the event loop "
        ".57 of a core, with half .62; half of the answers within .29 s, with half .52. With a quarter always, a crowd of 400 a second that comes at once got "
        "274 and 315 answers a second; as taken 380 and 397 (with half 368 and 391), and in storms, whose first second is a crowd, 892, 898 and 972 in time, "
        "a quarter beside them 1,044, 978 and 957 (AVX-512 without AMX)",
        "kept: a storm's answers come in half the time, for crowds nothing changed; whether more are answered is within the noise",
    ),
    (
        "the event loop goes before the threads that judge (niceness 5), which gave way to them; the next batch is sent in the turn in which one comes back",
        "the fifth of the cores that is idle in a storm: 1.15 times as many in time",
        "of 5,500 images/s 1,046 in time, before 922, with all alike 979, at niceness 10 1,055, medians of four; of 1,100 images/s .99 within 100 ms, before "
        ".98 (AVX-512 without AMX)",
        "kept ([decision 19](decisions/0019-who-holds-the-lock-goes-first.md))",
    ),
    (
        "a full batch waits ready for each thread that judges",
        "a further tenth: no thread waits for the event loop between batches",
        "of 5,500 images/s 1,055 in time, without it 1,063, medians of four (AVX-512 without AMX)",
        "not taken: the prediction was wrong",
    ),
    (
        "at most 32 images a batch",
        "an image in them costs the same, and each waits half as long",
        "of 5,500 images/s 946 in time, with 64 1,063, medians of four (AVX-512 without AMX)",
        "not taken: the device waits for the event loop twice as often",
    ),
    (
        "the interpreter's lock changes hands after 1 ms or .1 ms, not .3",
        "not predicted",
        "of 5,500 images/s 989 and 1,030 in time, with .3 1,063 and 997, medians of four (AVX-512 without AMX)",
        "not taken",
    ),
    (
        "how long an image takes is asked of crowds of the same size, not of the last 32 images, so that a quiet time is no reason to refuse a crowd",
        "the same in a storm",
        "of 5,500 images/s 1,073 in time (880 to 1,172), without it 1,125 (1,108 to 1,166), medians of six (AVX-512 without AMX)",
        "not taken: what fewer have said is old, and too many come in",
    ),
]
