"""The compiled loops of mean-field inference: one pass over the pixels for each update.

A pixel's scores are rows of float32, `chunks` vectors of equally many lanes. Scores are relative to those of the last label, and so are
probabilities: Q_c - Q_last. The last label needs no channel then, and unused lanes stay 0, as those of a label that is always as likely as
the last. For a block of pixels at a time the update gathers the messages from the lattices (slice), adds the unary, takes the softmax and
adds the outcome to the lattices (splat), so that neither scores nor probabilities go through memory.

Each thread owns a band of pixels and a table to splat into. The tables are added up, and the sum is blurred, by all threads together.
"""

import numpy as np
from numba import njit

from perpixel.refinement.team import share, wait
from perpixel.refinement.vectors import above, add_scaled, farther, fetch, filled, largest, load, plus, power, put, store, total

BLOCK = 16  # pixels whose scores lie side by side, so that exp works on full vectors whatever the number of labels
_SIXTEEN = (None,) * BLOCK


@njit(cache=True, nogil=True)
def to_rows(energies, rows, channels, first, last):  # type: ignore[no-untyped-def]
    """Scores relative to the last label, (P, width), from energies (K, P)."""
    labels = len(energies)
    far = np.float32(1.6e38)  # half of the largest number, so that differences of two scores are finite
    size, pixels = rows.shape[1], energies.shape[1]
    for start in range(first, last, BLOCK):
        stop = min(start + BLOCK, last)
        for c in range(size):
            for p in range(start, stop):
                if c < channels:
                    score = fetch(energies, (labels - 1) * pixels + p) - fetch(energies, c * pixels + p)
                    put(rows, p * size + c, min(max(score, -far), far))
                else:
                    put(rows, p * size + c, np.float32(0))


@njit(cache=True, nogil=True)
def scaled(weights, first_column, last_column, factors, first, last):  # type: ignore[no-untyped-def]
    """Multiply columns of weights by each pixel's factor, in place; a single factor is everyone's."""
    for p in range(first, last):
        factor = factors[p if len(factors) > 1 else 0]
        for j in range(first_column, last_column):
            weights[p, j] *= factor


@njit(cache=True, nogil=True)
def blur(number, team, opened, width, chunks, tables, first, starts, chains, links, k_first, k_last):  # type: ignore[no-untyped-def]
    """Add up the team's tables, `first` and the next ones around the end, into the first, and blur it in place along every axis."""
    lanes = len(width)
    size = len(chunks) * lanes
    table = tables[first]
    wait(opened, team)
    if team > 1:
        begin, end = share(starts[k_first], starts[k_last], number, team)
        for t in range(1, team):
            other = tables[(first + t) % len(tables)]
            for i in range(begin * size, end * size, lanes):
                store(table, i, plus(load(table, i, width), load(other, i, width)))
        wait(opened, team)
    for axis in range(links.shape[1] - 1):
        for k in range(k_first, k_last):
            if links[k, axis] < links[k, axis + 1]:
                begin, end = _own_chains(chains, links[k, axis], links[k, axis + 1], number, team)
                for b in range(len(chunks)):
                    _blur_chains(width, size, table, b * lanes, chains, begin, end)
        wait(opened, team)


@njit(cache=True, nogil=True)
def _own_chains(chains, first, last, number, team):  # type: ignore[no-untyped-def]
    """The chains that fall to a member of the team, as the places of the 0 before and of that after them."""
    begin, end = share(first, last - 1, number, team)
    while chains[begin]:
        begin += 1
    while chains[end]:
        end += 1
    return begin, end


@njit(cache=True, nogil=True)
def _blur_chains(width, size, table, i, chains, begin, end):  # type: ignore[no-untyped-def]
    """Filter the rows of every chain with (1/2, 1, 1/2). Each row is read once: the next one's old value is kept in registers."""
    half = np.float32(0.5)
    nothing = filled(np.float32(0), width)
    before, here, at = nothing, nothing, np.int64(0)
    for n in range(begin + 1, end + 1):
        row = np.int64(fetch(chains, n))
        after = load(table, row * size + i, width)  # row 0 is 0, so a chain ends by itself
        if at:
            store(table, at * size + i, add_scaled(here, half, plus(before, after)))
        before, here, at = here, after, row


@njit(cache=True, nogil=True)
def pass_through(number, team, opened, width, chunks, values, out, rows, splat, slices, columns, starts, chains, links, tables, k):  # type: ignore[no-untyped-def]
    """One kernel's filter of rows: splat, blur, slice."""
    lanes = len(width)
    size = len(chunks) * lanes
    flat, result = values.reshape(values.size), out.reshape(out.size)
    terms = rows.shape[1]
    first, last = share(0, len(rows), number, team)
    own = tables[number]
    own[:] = 0
    for p in range(first, last):
        for b in range(len(chunks)):
            i = b * lanes
            vector = load(flat, p * size + i, width)
            for j in range(p * terms + columns[k], p * terms + columns[k + 1]):
                place = fetch(rows, j) * size + i
                store(own, place, add_scaled(load(own, place, width), fetch(splat, j), vector))
    blur(number, team, opened, width, chunks, tables, 0, starts, chains, links, k, k + 1)
    blurred = tables[0]
    for p in range(first, last):
        for b in range(len(chunks)):
            i = b * lanes
            vector = filled(np.float32(0), width)
            for j in range(p * terms + columns[k], p * terms + columns[k + 1]):
                vector = add_scaled(vector, fetch(slices, j), load(blurred, fetch(rows, j) * size + i, width))
            store(result, p * size + i, vector)


@njit(cache=True, nogil=True)
def mix_labels(number, team, width, chunks, table, starts, k, matrix, scratch):  # type: ignore[no-untyped-def]
    """Multiply kernel k's rows of the blurred table by a matrix of labels, (channels, width): slicing is linear, and vertices are fewer."""
    lanes = len(width)
    size = len(chunks) * lanes
    flat = matrix.reshape(matrix.size)
    first, last = share(starts[k], starts[k + 1], number, team)
    for r in range(first, last):
        for i in range(size):
            scratch[i] = table[r * size + i]
        for b in range(len(chunks)):
            i = b * lanes
            vector = filled(np.float32(0), width)
            for c in range(len(matrix)):
                vector = add_scaled(vector, scratch[c], load(flat, c * size + i, width))
            store(table, r * size + i, vector)


@njit(cache=True, nogil=True, forceinline=True, error_model="numpy")
def _pixel(p, last, step, turn, even):  # type: ignore[no-untyped-def]
    """Of two neighbours at p, where only one is updated, the one whose turn it is, so that a checkerboard alternates.

    `even` is the image's width where that is even, else 0: with an odd width every second pixel already is a checkerboard.
    """
    if step == 1:
        return p
    return min(p + ((turn + (p // even if even else 0)) & 1), last - 1)


@njit(cache=True, nogil=True, error_model="numpy")
def update(  # type: ignore[no-untyped-def]
    width, chunks, terms, channels, unary, rows, splat, slices, blurred, own, block, kept, out,
    turn, final, damping, first, last, step, even,
):  # fmt: skip
    """One update of one pixel in `step` (1 or 2) of a band; the largest change of a probability where `kept` has the old ones.

    Args:
        width, chunks, terms: tuples as long as a vector, as a row in vectors, as a pixel has vertices: the compiler knows lengths.
        unary: (P * width,) scores before messages.
        blurred: the table to slice, unless `turn` is 0.
        own: the table to splat into.
        block: scratch.
        kept: (P, width + lanes) probabilities of the other labels, then of the last, where damping or convergence needs them, else empty.
        out: (K, P) log-probabilities, written instead of splatting where `final`.
    """
    lanes = len(width)
    size = len(chunks) * lanes
    corners = len(terms)
    spare = np.float32(1 - (size - channels))
    scores = block[: BLOCK * (size + 1)]
    powers = block[BLOCK * (size + 1) :]
    keeps = len(kept) > 0
    old = kept.reshape(kept.size)
    change = filled(np.float32(0), width)
    for start in range(first, last, BLOCK * step):
        count = min(BLOCK, (last - start + step - 1) // step)
        for n in range(count):
            p = _pixel(start + n * step, last, step, turn, even)
            peak = np.float32(0)  # the last label's score
            for b in range(len(chunks)):
                i = b * lanes
                score = load(unary, p * size + i, width)
                if turn > 0:
                    for j in range(p * corners, (p + 1) * corners):
                        score = add_scaled(score, fetch(slices, j), load(blurred, fetch(rows, j) * size + i, width))
                peak = max(peak, largest(score))
                store(scores, n * size + i, score)
            low = filled(-peak, width)
            for b in range(len(chunks)):
                i = n * size + b * lanes
                store(scores, i, plus(load(scores, i, width), low))
            scores[BLOCK * size + n] = -peak
        for i in range(0, BLOCK * (size + 1), BLOCK):
            store(powers, i, power(load(scores, i, _SIXTEEN)))
        for n in range(count):
            p = _pixel(start + n * step, last, step, turn, even)
            least = powers[BLOCK * size + n]
            whole = spare * least  # unused lanes are as large as the last label's, and counted by `total`
            for b in range(len(chunks)):
                i = n * size + b * lanes
                whole += total(load(powers, i, width))
            if final:
                powers[n * size] = np.log(whole)
                continue
            inverse = np.float32(1) / whole
            if keeps:
                for b in range(len(chunks) + 1):  # the last label's is alone in a vector whose other lanes are its copies
                    i = n * size + b * lanes
                    q = load(powers, i, width) if b < len(chunks) else filled(least, width)
                    at = p * (size + lanes) + b * lanes
                    before = load(old, at, width)
                    q = add_scaled(filled(np.float32(0), width), inverse, q)
                    if damping < 1:
                        q = add_scaled(add_scaled(filled(np.float32(0), width), damping, q), np.float32(1) - damping, before)
                    change = farther(change, q, before)
                    store(old, at, q)
                    if b < len(chunks):
                        store(powers, i, q)
                least = old[p * (size + lanes) + size]
                inverse = np.float32(1)
            for b in range(len(chunks)):
                i = b * lanes
                # Unused lanes give exactly 0: what rounding left there would grow from update to update where messages are strong.
                q = above(load(powers, n * size + i, width), least, inverse * np.float32(step))
                for j in range(p * corners, (p + 1) * corners):
                    place = fetch(rows, j) * size + i
                    store(own, place, add_scaled(load(own, place, width), fetch(splat, j), q))
        if final:
            _write(out, start, count, scores, powers, size, channels, old, size + lanes, damping)
    return largest(change)


@njit(cache=True, nogil=True)
def _write(out, start, count, scores, logs, size, channels, old, stride, damping):  # type: ignore[no-untyped-def]
    """Log-probabilities of a block, label by label: those of neighbouring pixels lie side by side in memory."""
    for c in range(channels + 1):
        place = c * out.shape[1] + start
        one, step = (c, size) if c < channels else (BLOCK * size, 1)
        for n in range(count):
            put(out, place + n, fetch(scores, one + n * step) - fetch(logs, n * size))
        if damping < 1:
            for n in range(count):
                before = fetch(old, (start + n) * stride + (c if c < channels else size))
                put(out, place + n, np.log(max(damping * np.exp(fetch(out, place + n)) + (1 - damping) * before, np.float32(1e-30))))


@njit(cache=True, nogil=True, error_model="numpy")
def infer(  # type: ignore[no-untyped-def]
    number, team, opened, width, chunks, terms, channels, unary, begin, rows, splat, slices, columns, starts, chains, links,
    tables, blocks, matrices, mixed, kept, changes, out, iterations, damping, tolerance, coarse, even,
):  # fmt: skip
    """One thread's part of mean field from the softmax of `begin`; writes the log-probabilities of the last update to `out`.

    `coarse` early updates are of every second pixel. With a tolerance, an update that changes no probability by more is the last but one.
    """
    first, last = share(0, len(rows), number, team)
    block = blocks[number]
    around = team + 1  # tables: those that are splatted into, and the one that is sliced; that changes from turn to turn
    done = False
    for turn in range(iterations + 1):  # turn 0 is the softmax of `begin`
        sliced = turn % around
        blurred, own = tables[sliced], tables[(sliced + 1 + number) % around]
        if turn > 0:
            blur(number, team, opened, width, chunks, tables[:around], sliced, starts, chains, links, 0, len(starts) - 1)
            for k in range(len(starts) - 1):
                if mixed[k]:
                    mix_labels(number, team, width, chunks, blurred, starts, k, matrices[k], block)
                    wait(opened, team)
        own[:] = 0
        if tolerance > 0 and turn > 1:
            done = changes[:team].max() < tolerance
        final = done or turn == iterations
        changes[number] = update(
            width, chunks, terms, channels, unary if turn else begin, rows, splat, slices, blurred, own, block, kept, out,
            turn, final, damping if turn else np.float32(1), first, last, 2 if turn < coarse else 1, even,
        )  # fmt: skip
        if final:
            break
