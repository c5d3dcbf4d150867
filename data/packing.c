/* Documents -> rows of length L, filled end to end:
 *
 *     row 0 | A A A A A B B B |      document 0 0 0 0 0 1 1 1      A's last position has no target, nor has the row's last
 *     row 1 | B B C C C . . . |               0 0 1 1 1 2 2 2      B goes on as a new piece; the rest of the last row is padding
 *
 * loss_mask[t] = 1 where t and t+1 lie in one piece and token t+1 is learnt. So every document loses its first token as a
 * target, and a document that continues in the next row one more for every row it enters.
 */
#include "data/packing.h"

#include <stdlib.h>
#include <string.h>

#include "base/error.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "hashes and shards are defined on little-endian arrays");

void documents_add(struct documents *d, const int32_t *ids, const uint8_t *mask, const struct document *document)
{
    int64_t n = document->n;
    if (d->n_ids + n > d->ids_room) {
        while (d->n_ids + n > d->ids_room) d->ids_room = d->ids_room ? d->ids_room + d->ids_room / 2 : 1 << 16;
        d->ids = xrealloc(d->ids, (size_t)d->ids_room * sizeof *d->ids);
    }
    if (d->n == d->room) d->item = xrealloc(d->item, (size_t)(d->room = d->room ? 2 * d->room : 256) * sizeof *d->item);
    for (int64_t i = 0; i < n; i++) d->ids[d->n_ids + i] = (uint32_t)ids[i] | (mask && !mask[i] ? ID_NOT_LEARNT : 0);
    d->item[d->n] = *document;
    d->item[d->n++].begin = d->n_ids;
    d->n_ids += n;
}

void documents_clear(struct documents *d)
{
    free(d->ids);
    free(d->item);
    *d = (struct documents){0};
}

struct corpus_rows *rows_pack(const struct documents *d, const int64_t *order, int64_t n, int64_t length, int64_t max_rows, uint32_t padding,
                              const int32_t *token_bytes, int32_t n_token_bytes)
{
    CHECK(length >= 2 && length <= UINT16_MAX, "row length %lld", (long long)length);
    struct corpus_rows *r = xcalloc(1, sizeof *r);
    int64_t total = 0;
    for (int64_t i = 0; i < n; i++) total += d->item[order[i]].n;
    r->length = length;
    r->rows = (total + length - 1) / length;
    if (max_rows && r->rows > max_rows) r->rows = max_rows;
    size_t positions = (size_t)(r->rows * length);
    r->tokens = xmalloc(positions * sizeof *r->tokens);
    r->loss_mask = xcalloc(positions, 1);
    r->document = xmalloc(positions * sizeof *r->document);

    int64_t at = 0;                                                   /* the next free position over all rows */
    uint16_t piece = 0;
    for (int64_t i = 0; i < n && at < (int64_t)positions; i++) {
        const struct document *doc = &d->item[order[i]];
        for (int64_t done = 0; done < doc->n && at < (int64_t)positions;) {
            int64_t room = length - at % length, m = doc->n - done < room ? doc->n - done : room;
            const uint32_t *ids = d->ids + doc->begin + done;
            if (room == length) piece = 0;
            for (int64_t t = 0; t < m; t++) {
                uint32_t id = ids[t] & ~ID_NOT_LEARNT;
                r->tokens[at + t] = id;
                r->document[at + t] = piece;
                if ((int32_t)id > r->max_id) r->max_id = (int32_t)id;
                if (t + 1 == m || (ids[t + 1] & ID_NOT_LEARNT)) continue;
                r->loss_mask[at + t] = 1;
                r->targets++;
                if (token_bytes && ids[t + 1] < (uint32_t)n_token_bytes) r->bytes += token_bytes[ids[t + 1]];
            }
            piece++;
            at += m;
            done += m;
        }
        r->documents++;
        r->cut_documents += doc->cut;
    }
    r->tokens_total = at;
    for (; at < (int64_t)positions; at++) {
        r->tokens[at] = padding;
        r->document[at] = piece;
        if ((int32_t)padding > r->max_id) r->max_id = (int32_t)padding;
    }
    return r;
}

void corpus_rows_free(struct corpus_rows *r)
{
    if (!r) return;
    free(r->tokens);
    free(r->loss_mask);
    free(r->document);
    free(r);
}

void corpus_rows_hash(const struct corpus_rows *r, char hex[SHA256_HEX])
{
    struct sha256 *h = sha256_new();
    size_t positions = (size_t)(r->rows * r->length);
    sha256_add(h, &r->rows, sizeof r->rows);
    sha256_add(h, &r->length, sizeof r->length);
    sha256_add(h, r->tokens, positions * sizeof *r->tokens);
    sha256_add(h, r->loss_mask, positions * sizeof *r->loss_mask);
    sha256_add(h, r->document, positions * sizeof *r->document);
    sha256_hex(h, hex);
}
