/* hash: published test vectors, any split of the input, and files. */
#include <criterion/criterion.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"

Test(hash, sha256_vectors)      /* FIPS 180-4 examples */
{
    char hex[SHA256_HEX];
    sha256_of("", 0, hex);
    cr_assert_str_eq(hex, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    sha256_of("abc", 3, hex);
    cr_assert_str_eq(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    char *million = xmalloc(1000000), other[SHA256_HEX];
    memset(million, 'a', 1000000);
    sha256_of(million, 1000000, hex);
    cr_assert_str_eq(hex, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    struct sha256 *h = sha256_new();
    for (size_t at = 0, n = 1; at < 1000000; at += n, n = n % 977 + 1) sha256_add(h, million + at, at + n < 1000000 ? n : 1000000 - at);
    sha256_hex(h, other);
    cr_assert_str_eq(other, hex);
    free(million);
}

Test(hash, crc32c_vectors)      /* RFC 3720 B.4 */
{
    unsigned char zeros[32] = {0}, ones[32], up[32], down[32];
    for (int i = 0; i < 32; i++) { ones[i] = 0xff; up[i] = (unsigned char)i; down[i] = (unsigned char)(31 - i); }
    cr_assert_eq(crc32c(0, "123456789", 9), 0xe3069283u);
    cr_assert_eq(crc32c(0, zeros, 32), 0x8a9136aau);
    cr_assert_eq(crc32c(0, ones, 32), 0x62a8ab43u);
    cr_assert_eq(crc32c(0, up, 32), 0x46dd794eu);
    cr_assert_eq(crc32c(0, down, 32), 0x113fdb5cu);
    cr_assert_eq(crc32c(0, "", 0), 0u);
}

Test(hash, crc32c_of_parts_and_alignments)
{
    unsigned char data[257];
    for (int i = 0; i < 257; i++) data[i] = (unsigned char)(i * 37 + 11);
    for (size_t begin = 0; begin < 9; begin++)
        for (size_t cut = begin; cut <= 257; cut += 13) cr_assert_eq(crc32c(crc32c(0, data + begin, cut - begin), data + cut, 257 - cut), crc32c(0, data + begin, 257 - begin));
    for (int bit = 0; bit < 257 * 8; bit++) {       /* every single flipped bit shows */
        uint32_t before = crc32c(0, data, 257);
        data[bit / 8] ^= (unsigned char)(1 << bit % 8);
        cr_assert_neq(crc32c(0, data, 257), before);
        data[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
}

Test(hash, file)
{
    char dir[] = "/tmp/test_hash_XXXXXX", hex[SHA256_HEX];
    cr_assert(mkdtemp(dir));
    char *path = path_join(dir, "x"), *data = xmalloc(3000001), want[SHA256_HEX];
    for (int i = 0; i < 3000001; i++) data[i] = (char)(i * 31);
    cr_assert_eq(file_replace(path, data, 3000001), OK);
    cr_assert_eq(sha256_of_file(path, hex), OK);
    sha256_of(data, 3000001, want);
    cr_assert_str_eq(hex, want);
    cr_assert_eq(file_replace(path, "", 0), OK);
    cr_assert_eq(sha256_of_file(path, hex), OK);
    cr_assert_eq(strncmp(hex, "e3b0c442", 8), 0);
    cr_assert_eq(sha256_of_file("/nonexistent/file", hex), ERR_IO);
    cr_assert_eq(sha256_of_file(dir, hex), ERR_IO);
    free(path);
    free(data);
    cr_assert_eq(dir_remove_tree(dir), OK);
}
