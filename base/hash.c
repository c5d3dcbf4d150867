/* SHA-256 through OpenSSL; CRC-32C with the processor's instruction where there is one. */
#include "base/hash.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"

struct sha256 { EVP_MD_CTX *ctx; };

struct sha256 *sha256_new(void)
{
    struct sha256 *h = xmalloc(sizeof *h);
    h->ctx = EVP_MD_CTX_new();
    CHECK(h->ctx && EVP_DigestInit_ex(h->ctx, EVP_sha256(), NULL) == 1, "OpenSSL has no SHA-256");
    return h;
}

void sha256_add(struct sha256 *h, const void *data, size_t bytes) { EVP_DigestUpdate(h->ctx, data, bytes); }

void sha256_hex(struct sha256 *h, char hex[SHA256_HEX])
{
    unsigned char digest[32];
    unsigned int n = sizeof digest;
    EVP_DigestFinal_ex(h->ctx, digest, &n);
    for (int i = 0; i < 32; i++) snprintf(hex + 2 * i, 3, "%02x", digest[i]);
    EVP_MD_CTX_free(h->ctx);
    free(h);
}

void sha256_of(const void *data, size_t bytes, char hex[SHA256_HEX])
{
    struct sha256 *h = sha256_new();
    sha256_add(h, data, bytes);
    sha256_hex(h, hex);
}

int sha256_of_file(const char *path, char hex[SHA256_HEX])
{
    int rc = OK, fd = open(path, O_RDONLY | O_CLOEXEC);
    struct sha256 *h = sha256_new();
    enum { CHUNK = 1 << 20 };
    char *buffer = xmalloc(CHUNK);
    if (fd < 0) { rc = fail_errno(ERR_IO, "%s: cannot open", path); goto out; }
    for (;;) {
        ssize_t n = read(fd, buffer, CHUNK);
        if (n < 0) { rc = fail_errno(ERR_IO, "%s: cannot read", path); goto out; }
        if (n == 0) break;
        sha256_add(h, buffer, (size_t)n);
    }
out:
    sha256_hex(h, hex);
    free(buffer);
    if (fd >= 0) close(fd);
    return rc;
}

#if defined(__SSE4_2__)
#include <nmmintrin.h>

uint32_t crc32c(uint32_t crc, const void *data, size_t bytes)
{
    const unsigned char *p = data;
    uint64_t c = ~crc;
    for (; bytes >= 8; p += 8, bytes -= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        c = _mm_crc32_u64(c, word);
    }
    for (; bytes; p++, bytes--) c = _mm_crc32_u8((uint32_t)c, *p);
    return ~(uint32_t)c;
}

#else

uint32_t crc32c(uint32_t crc, const void *data, size_t bytes)
{
    static uint32_t table[256];
    if (!table[1])   /* every thread that races here writes the same values */
        for (int i = 255; i >= 0; i--) {
            uint32_t c = (uint32_t)i;
            for (int bit = 0; bit < 8; bit++) c = (c >> 1) ^ (0x82f63b78u & (0u - (c & 1)));
            table[i] = c;
        }
    const unsigned char *p = data;
    crc = ~crc;
    while (bytes--) crc = table[(crc ^ *p++) & 255] ^ (crc >> 8);
    return ~crc;
}

#endif
