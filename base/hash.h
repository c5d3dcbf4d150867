/* SHA-256 (OpenSSL) for identity, CRC-32C (Castagnoli) for accidents. */
#ifndef BASE_HASH_H
#define BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

#define SHA256_HEX 65   /* 64 lower-case hex digits and a NUL */

struct sha256;                                      /* a running hash */
struct sha256 *sha256_new(void);
void sha256_add(struct sha256 *h, const void *data, size_t bytes);
void sha256_hex(struct sha256 *h, char hex[SHA256_HEX]);   /* finishes and frees h */

void sha256_of(const void *data, size_t bytes, char hex[SHA256_HEX]);
int  sha256_of_file(const char *path, char hex[SHA256_HEX]);   /* ERR_IO when it cannot be read */

/* CRC-32C of `bytes` bytes, continuing from `crc` (0 to start): RFC 3720 appendix B.4; crc32c(0, "123456789", 9) = 0xe3069283. */
uint32_t crc32c(uint32_t crc, const void *data, size_t bytes);

#endif
