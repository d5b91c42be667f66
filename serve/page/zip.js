// Writes ZIP archives of stored (uncompressed) files: images are compressed already.
// Format: PKWARE's APPNOTE.TXT, 4.3.7 (local header), 4.3.12 (central directory), 4.3.16 (its end).

const UTF8_NAMES = 0x0800; // general purpose flag 11
const VERSION = 20;
const TABLE = Uint32Array.from({ length: 256 }, (_, i) => {
  for (let bit = 0; bit < 8; bit++) i = i & 1 ? (i >>> 1) ^ 0xedb88320 : i >>> 1;
  return i;
});

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) crc = TABLE[(crc ^ byte) & 0xff] ^ (crc >>> 8);
  return ~crc >>> 0;
}

/** Numbers of two or four bytes, little-endian: [[size, value], …] → bytes. */
function pack(fields) {
  const bytes = new Uint8Array(fields.reduce((sum, [size]) => sum + size, 0));
  const view = new DataView(bytes.buffer);
  let at = 0;
  for (const [size, value] of fields) {
    if (size === 2) view.setUint16(at, value, true);
    else view.setUint32(at, value, true);
    at += size;
  }
  return bytes;
}

/** Date and time in MS-DOS's format, in steps of two seconds. */
function dosTime(date) {
  const time = (date.getHours() << 11) | (date.getMinutes() << 5) | (date.getSeconds() >> 1);
  const day = ((date.getFullYear() - 1980) << 9) | ((date.getMonth() + 1) << 5) | date.getDate();
  return [time, day];
}

/** An archive of `files`, [{name, blob, date}] with different names. */
export async function createZip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const { name, blob, date } of files) {
    const bytes = new Uint8Array(await blob.arrayBuffer());
    const encoded = new TextEncoder().encode(name);
    const [time, day] = dosTime(date);
    const common = [
      ...[VERSION, UTF8_NAMES, 0, time, day].map((value) => [2, value]),
      ...[crc32(bytes), bytes.length, bytes.length].map((value) => [4, value]),
      [2, encoded.length],
      [2, 0],
    ];
    const header = pack([[4, 0x04034b50], ...common]);
    const none = [[2, 0], [2, 0], [2, 0], [4, 0]]; // comment, disk, attributes
    directory.push(pack([[4, 0x02014b50], [2, VERSION], ...common, ...none, [4, offset]]), encoded);
    parts.push(header, encoded, blob);
    offset += header.length + encoded.length + bytes.length;
  }
  const size = directory.reduce((sum, { length }) => sum + length, 0);
  const counts = [[2, 0], [2, 0], [2, files.length], [2, files.length]];
  const end = pack([[4, 0x06054b50], ...counts, [4, size], [4, offset], [2, 0]]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}
